"""Lab 05's ablation as a command, for an evening: which tricks help, and at which rates of the scalars.

    python -m primechat.labkit.instruments.ablation tricks --minutes 120
    python -m primechat.labkit.instruments.ablation rates --minutes 60

Each run is one of its own tag, so that the same command goes on where the time was up; what is complete is
printed and written to a file of JSON. All runs read the same number of tokens, in one precision, uncompiled,
and are scored on the whole held-out split.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from dataclasses import replace
from typing import Any

from primechat.config import EvalConfig, PretrainConfig, RuntimeConfig, recipes
from primechat.events import LossEvent, NoteEvent
from primechat.files.paths import resolve_path, write_whole
from primechat.labkit.instruments.pretraining import (
    RATES,
    SWITCHES,
    AblationConfig,
    AblationResult,
    ablate,
    judge_ablation,
)


def main(argv: list[str] | None = None) -> int:
    """Run one of the two comparisons; return 0 where it is complete, else 1."""
    flags = parse_flags(argv)
    stop = threading.Event()
    timer = threading.Timer(60 * flags.minutes, stop.set)
    timer.daemon = True
    timer.start()
    try:
        result = (compare_tricks if flags.what == "tricks" else compare_rates)(flags, stop)
    finally:
        timer.cancel()

    rows = judge_ablation(result)
    if isinstance(rows, list):
        for row in rows:
            if flags.what == "rates":
                row.pop("so the trick", None)  # nothing was taken away
            print("; ".join(f"{key} {value}" for key, value in row.items() if value))
    found = {"settings": vars(flags), "bpb": result.bpb, "complete": not result.stopped}
    path = resolve_path(flags.output or f"ablation-{flags.what}.json")
    write_whole(path, json.dumps({**found, "table": rows}, indent=2).encode())
    print(
        f"{'Complete' if not result.stopped else 'The time is up; the same command goes on'}: {path}"
    )
    return int(result.stopped)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Return the settings of a comparison."""
    parser = argparse.ArgumentParser(prog="python -m primechat.labkit.instruments.ablation")
    parser.add_argument("what", choices=("tricks", "rates"))
    parser.add_argument("--minutes", type=float, default=120.0, help="stop after so long")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens that each run reads")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the model")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--rates", choices=tuple(RATES), default="nanochat2026")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--output", default="", help="file of JSON to write")
    return parser.parse_args(argv)


def build_base(flags: argparse.Namespace) -> PretrainConfig:
    """Return the run with every trick on: quickstart's, measured on the whole split at its end alone."""
    return replace(
        recipes.quickstart(flags.depth),
        batch_tokens=flags.batch_tokens,
        seconds=0.0,
        eval=EvalConfig(every=10**6, tokens=4096, last_tokens=0, sample_every=-1, snapshots=False),
        runtime=RuntimeConfig(
            device="cpu",
            dtype=flags.dtype,
            threads=flags.threads,
            micro_batch_rows=8,
            compile="off",
        ),
    )


def run_ablation(
    flags: argparse.Namespace, stop: threading.Event, rates: str, switches: str
) -> AblationResult:
    """Run the variants of one set of rates."""
    config = AblationConfig(
        tag=f"ablation-{rates.replace('+', '-')}",
        switches=switches,
        seeds=flags.seeds,
        steps=flags.tokens // flags.batch_tokens,
        rates=rates,
        base=build_base(flags),
    )

    def emit(event: Any) -> None:
        if isinstance(event, NoteEvent):
            print(f"{rates}: {event.text}", flush=True)
        elif isinstance(event, LossEvent) and event.step:
            print(f"  {event.val_bpb:.4f} bits per byte after {event.elapsed_s:.0f} s", flush=True)

    return ablate(config, on_event=emit, stop=stop)


def compare_tricks(flags: argparse.Namespace, stop: threading.Event) -> AblationResult:
    """Take every trick of 2026 away, one at a time."""
    return run_ablation(flags, stop, flags.rates, ", ".join(SWITCHES))


def compare_rates(flags: argparse.Namespace, stop: threading.Event) -> AblationResult:
    """Train with everything on at each set of rates; ours is what the others are held against."""
    bpb: dict[str, list[float]] = {}
    stopped = False
    for rates in RATES:
        if not stop.is_set():
            result = run_ablation(flags, stop, rates, "")
            name = "everything on" if rates == "quickstart" else rates
            bpb[name] = result.bpb.get("everything on", [])
        stopped = stopped or stop.is_set()
    whole = {name: values for name, values in bpb.items() if values}
    return AblationResult(identifier="ablation-rates", bpb=whole, stopped=stopped)


if __name__ == "__main__":
    raise SystemExit(main())

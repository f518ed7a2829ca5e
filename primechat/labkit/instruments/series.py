"""Series of small runs for labs 06 to 08, remembered and compared.

Hides: that each run has a folder named after its settings, so that a lab that is opened again shows what has
run already and goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, read_meta
from primechat.checkpoint.run_dir import read_frozen, read_metrics
from primechat.config import DistillConfig, EvalConfig, FinetuneConfig, LoRAConfig, RuntimeConfig
from primechat.config.model import SHARES
from primechat.config.runtime import check_number
from primechat.errors import ConfigError
from primechat.events import NoteEvent, OnEvent, TrainResult, pair_bpb
from primechat.metrics.intervals import estimate_mean
from primechat.stages.eval_budget import CHOSEN
from primechat.text.dialogues import READING

QUICK = RuntimeConfig(compile="off")  # the rest is measured by the first run of a series
COLUMNS = {
    "val_bpb": "bits per byte",
    "kl_nats": "KL, nats",
}  # of tables, where the figure's name is no word
QUIET = EvalConfig(sample_every=-1, snapshots=False)
COMMON_TOKENS = 8192  # of all sets compared, on which a model is scored


def run_once(
    function: Callable[..., TrainResult],
    config: Any,
    family: str,
    on_event: OnEvent | None,
    stop: threading.Event,
) -> TrainResult:
    """Return what a run of a comparison made, running it only where it has not ended before.

    What an older version made of other conversations of the same name is not remembered; what the first run
    of a series has measured for the others does not count as a setting.
    """
    evaluation = replace(config.eval, every=0, tokens=CHOSEN, last_tokens=CHOSEN)
    settings = repr(replace(config, runtime=RuntimeConfig(), eval=evaluation))
    if isinstance(config, FinetuneConfig) and config.dialogues:
        settings += f" {READING}"
    name = hashlib.sha256(settings.encode()).hexdigest()[:6]
    config = replace(config, tag=f"{config.tag}-{name}")
    folder = registry.run_dir(family, config.tag)
    steps = find_steps(folder)
    if steps and any(
        e.get("kind") == "done" and not e.get("stopped")
        for e in read_metrics(folder / "metrics.jsonl")
    ):
        return registry.load_run(folder)
    registry.mark_by_product(folder, f"a comparison of the labs, run {config.tag}")
    return function(replace(config, resume=bool(steps)), on_event=on_event, stop=stop)


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """A series of small runs, compared."""

    model: str = "shipped/base"
    """Where each run starts."""
    names: str = "chitchat, style:pirate, faq"
    """What is compared, with commas between."""
    seeds: int = 2
    """Runs of each."""
    steps: int = 12
    """Optimizer steps of a run; more tell more."""
    batch_tokens: int = 2048
    """Tokens of a step."""

    def __post_init__(self) -> None:
        check_number("seeds", self.seeds, low=1, whole=True)
        check_number("steps", self.steps, low=1, whole=True)
        if not self.list_names():
            raise ConfigError("names='' must name what to compare; try two, with a comma between.")

    def list_names(self) -> list[str]:
        """Return what is compared, each once."""
        return list(dict.fromkeys(filter(None, (name.strip() for name in self.names.split(",")))))


def compare_sets(
    config: SeriesConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> list[dict[str, Any]]:
    """Fine-tune on one set at a time, at the same number of steps and tokens.

    Each run is measured on its own held-back talks and on common ones: as many tokens of each set compared.
    """
    from primechat.stages.finetune import finetune

    def build(name: str, seed: int, runtime: RuntimeConfig) -> tuple[Any, Any, str]:
        plain = re.sub(r"\W|_", "-", name)
        made = FinetuneConfig(
            tag=f"lab06-{plain}-{seed}",
            base=config.model,
            dialogues=name,
            seed=seed,
            steps=config.steps,
            batch_tokens=config.batch_tokens,
            runtime=runtime,
        )
        return finetune, made, "sft"

    rows = list(work_series(config, build, on_event, stop))
    before = score_together(config.model, config) if rows else 0.0
    return [
        {**row, "common gain": before - score_together(row["identifier"], config)} for row in rows
    ]


def score_together(identifier: str, config: SeriesConfig) -> float:
    """Return a model's bits per byte on the assistant's words of held-back talks of all sets compared."""
    from primechat.labkit.lab import borrow_model
    from primechat.metrics.bits import Bits, measure_bits
    from primechat.stages.finetune import cache_dialogues
    from primechat.text.batches import validation_windows

    model, tokenizer, _ = borrow_model(identifier)
    total, tokens = Bits(), COMMON_TOKENS // len(config.list_names())
    for name in config.list_names():
        cache = cache_dialogues(FinetuneConfig(dialogues=name), "val", tokenizer)
        windows = validation_windows(cache, model.sequence_len, max_tokens=tokens)
        bits = measure_bits(
            lambda x, y: model.loss(x, y, "none"), windows, tokenizer.byte_lengths()
        )
        total = Bits(nats=total.nats + bits.nats, n_bytes=total.n_bytes + bits.n_bytes)
    return total.bpb


def compare_ranks(
    config: SeriesConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> list[dict[str, Any]]:
    """Teach one domain with adapters of several ranks (`1`, `8`) and by full fine-tuning (`full`)."""
    from primechat.stages.finetune import finetune
    from primechat.stages.lora import train_lora

    def build(name: str, seed: int, runtime: RuntimeConfig) -> tuple[Any, Any, str]:
        common: Any = dict(
            tag=f"lab07-{name}-{seed}",
            base=config.model,
            dialogues="style:pirate",
            seed=seed,
            steps=config.steps,
            batch_tokens=config.batch_tokens,
            runtime=runtime,
        )
        if name != "full" and not (name.isdigit() and int(name)):
            raise ConfigError(f"names: {name!r} must be a rank, as 8, or full; correct it.")
        if name == "full":
            return finetune, FinetuneConfig(**common), "sft"
        return train_lora, LoRAConfig(**common, rank=int(name), alpha=2.0 * int(name)), "lora"

    return list(work_series(config, build, on_event, stop))


def compare_sizes(
    config: SeriesConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> list[dict[str, Any]]:
    """Teach students of several sizes, each with the teacher and, as a control, from the text alone."""
    from primechat.stages.distill import distill

    def build(name: str, seed: int, runtime: RuntimeConfig) -> tuple[Any, Any, str]:
        size, _, kind = name.partition(" ")
        if size not in SHARES or kind not in ("taught", "alone"):
            raise ConfigError(
                f"names: {name!r} must be like `eighth taught` or `half alone`; correct it."
            )
        made = DistillConfig(
            tag=f"lab08-{size}-{seed}",
            teacher=config.model,
            size=size,
            seed=seed,
            alpha=0.1 if kind == "taught" else 1.0,
            steps=config.steps,
            batch_tokens=config.batch_tokens,
            runtime=runtime,
        )
        return distill, made, "base"

    return list(work_series(config, build, on_event, stop))


def work_series(
    config: SeriesConfig,
    build: Callable[..., tuple[Any, Any, str]],
    on_event: OnEvent | None,
    stop: threading.Event | None,
) -> Iterator[dict[str, Any]]:
    """Yield a row a run; the first one measures the machine and chooses how much text all are scored on."""
    stop, emit = stop or threading.Event(), on_event or (lambda event: None)
    runtime, evaluation = QUICK, QUIET
    for seed in range(config.seeds):
        for name in config.list_names():
            if stop.is_set():
                return
            emit(NoteEvent(text=f"{name}, seed {seed}"))
            function, made, family = build(name, seed, runtime)
            made = replace(made, eval=evaluation)
            result = run_once(function, made, family, on_event, stop)
            if not result.stopped:
                folder = registry.base_dir() / result.path
                if (folder / "config.json").is_file():
                    frozen = read_frozen(folder, type(made))
                    runtime, evaluation = frozen.runtime, share_evals(evaluation, frozen.eval)
                yield describe_run(name, seed, result, family, config.model)


def share_evals(asked: EvalConfig, frozen: EvalConfig) -> EvalConfig:
    """Return the looks of the runs to come: as often and on as many tokens as the one that froze its own."""
    names = ("every", "tokens", "last_tokens")
    return replace(asked, **{name: getattr(frozen, name) for name in names})


def describe_run(
    name: str, seed: int, result: TrainResult, family: str, base: str
) -> dict[str, Any]:
    """Return what a run gained and forgot, in bits per byte, and what it took."""
    losses = [e for e in result.events if e.get("kind") == "loss"]
    first, last = losses[0], losses[-1]
    folder = registry.base_dir() / result.path
    tag = folder.name
    state = max((p.stat().st_size for p in folder.glob("optim_*.pt")), default=0)
    opened = f"lora:{tag}+{base}" if family == "lora" else f"{family}/{tag}"
    n_params = result.n_params or int(read_meta(folder, find_steps(folder)[-1])["lora"]["n_params"])
    row = {
        "name": name,
        "seed": seed,
        "identifier": opened,
        "gain": pair_bpb(first) - pair_bpb(last),  # of the same tokens
        "val_bpb": last["val_bpb"],
        "scored tokens": int(last.get("tokens") or 0),
        "seconds": result.train_s,
        "optimizer MB": state / 1e6,
        "parameters": n_params,
    }
    if first.get("general_bpb") is not None and last.get("general_bpb") is not None:
        row["forgotten"] = last["general_bpb"] - first["general_bpb"]
    for key in ("retention", "agreement", "kl_nats", "distinct_2", "repetition"):
        if last.get(key) is not None:
            row[key.replace("distinct_2", "distinct-2")] = last[key]
    return row


def sum_rows(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a name: the mean over its seeds with its 95 % interval; of two seeds, both values."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        shown: dict[str, Any] = {"run": name, "seeds": len(mine)}
        for key in keys:
            values = [float(row[key]) for row in mine if key in row]
            digits = 1 if key == "seconds" else 3
            if len(values) == 2:
                shown[key] = f"{values[0]:.{digits}f}, {values[1]:.{digits}f}"
            elif values:
                mean, low, _ = estimate_mean(values)
                shown[key] = f"{mean:.{digits}f}" + (
                    f" ± {mean - low:.{digits}f}" if len(values) > 2 else ""
                )
        table.append({COLUMNS.get(key, key): value for key, value in shown.items()})
    return table or [{"run": "nothing yet: it comes when the run above is done"}]

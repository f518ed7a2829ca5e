"""`primechat bench`: how fast this machine trains, generates and tokenizes, as medians over repeats.

The speed of a small model depends heavily on other processes. Candidates therefore take turns, and figures
can be compared within one run only. Reference: the depth-4 model of `primechat pretrain`.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import tyro

from primechat.cloud.ranks import bench_ranks
from primechat.config import GPTConfig, OptimConfig, PretrainConfig, RuntimeConfig
from primechat.config.runtime import check_number
from primechat.errors import PrimechatError
from primechat.files.paths import make_folder, write_file

if TYPE_CHECKING:
    from primechat.infer.engine import Engine

BATCH_TOKENS = 8192
TURN_STEPS = 3  # optimizer steps before the next candidate takes its turn
PROMPT_TOKENS = 64
NEW_TOKENS = 64
ROWS = 32  # conversations generated at once
TUNE_SECONDS = 300.0  # the training time that `auto` optimises for


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure how fast this machine trains, generates or tokenizes, and what several processes cost."""

    what: tyro.conf.Positional[Literal["train", "infer", "tokenizer", "ranks"]] = "train"
    """What to measure."""
    json: bool = False
    """Print JSON instead of a table."""
    seconds: float = 10.0
    """Time to spend on each candidate, once it is set up."""
    model: str = ""
    """Model for infer, for example sft/d4; empty is the depth-4 model with random weights."""
    device: str = "auto"
    """cpu, mps, cuda, or auto."""

    def __post_init__(self) -> None:
        RuntimeConfig(device=self.device)
        check_number("seconds", self.seconds, low=0.1)


def run_bench(config: BenchConfig) -> int:
    """Measure, print the figures and return the exit code."""
    benches: dict[str, Callable[[BenchConfig], list[dict[str, Any]]]] = {
        "train": bench_train,
        "infer": bench_infer,
        "tokenizer": bench_tokenizer,
        "ranks": lambda config: bench_ranks(config.seconds),
    }
    rows = benches[config.what](config)
    machine = describe_machine()
    if config.what == "train":
        keep_speed(rows[-1])
    if config.json:
        print(json.dumps({"bench": config.what, "machine": machine, "rows": rows}, indent=2))
    else:
        print(" · ".join(f"{name} {value}" for name, value in machine.items()))
        show_rows(rows)
    return 0


def keep_speed(row: dict[str, Any]) -> None:
    """Write the speed of `auto` to the base directory, for `primechat plan --gpus here`."""
    from primechat.checkpoint.registry import base_dir
    from primechat.cloud.plan import BENCH_FILE, count_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "flops_per_s": row["tokens_per_s"] * count_flops(PretrainConfig().model),
        "memory_bytes": memory,
        "tokens_per_s": row["tokens_per_s"],
    }
    try:
        write_file(make_folder(base_dir()) / BENCH_FILE, json.dumps(found))
    except PrimechatError as error:  # the figures are printed in any case
        say(str(error))


def describe_machine() -> dict[str, str]:
    """Return the versions and hardware that the figures depend on."""
    import torch

    from primechat.train.autotune import count_cores

    units = torch.backends.cpu.get_cpu_capability()
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        units += " AMX"
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": str(count_cores()),
    }
    return {**found, "processor": f"{platform.machine()} {units}", **gpu}


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows with the same keys as a table."""
    cells = [
        [name.replace("_", " ") for name in rows[0]],
        *([*map(format_figure, row.values())] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        words = zip(line, widths, rows[0].values(), strict=True)
        print(
            "  ".join(w.ljust(n) if isinstance(kind, str) else w.rjust(n) for w, n, kind in words)
        )


def format_figure(value: object) -> str:
    """Return the text of a cell: floats without decimals from 100 on, with two decimals below.

    >>> format_figure(24512.3), format_figure(1.987), format_figure(8), format_figure("eager")
    ('24,512', '1.99', '8', 'eager')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def say(text: str) -> None:
    """Print a message to stderr, so that stdout contains only the figures."""
    print(text, file=sys.stderr, flush=True)


def repeat_call(call: Callable[[], object], seconds: float) -> float:
    """Return the median duration of a call in seconds, repeated for about `seconds`.

    The first call is a warm-up and is not counted, unless it is the only one.
    """
    times: list[float] = []
    t_start = t_last = time.perf_counter()
    while t_last - t_start < seconds or (len(times) < 4 and t_last - t_start < 2 * seconds):
        call()
        times.append(time.perf_counter() - t_last)
        t_last += times[-1]
    return statistics.median(times[1:] or times)


@dataclass(kw_only=True)
class Candidate:
    """A training candidate, ready to run: `turn` takes some steps and returns their tokens per second."""

    name: str
    runtime: RuntimeConfig
    compile_s: float
    turn: Callable[[], list[float]]
    speeds: list[float]


def bench_train(config: BenchConfig, shape: GPTConfig | None = None) -> list[dict[str, Any]]:
    """Return the tokens per second of whole optimizer steps, one row per candidate.

    The candidates are eager and compiled, each in float32 and, if the device supports it, bfloat16, and
    finally auto. `ratio` is relative to the first row, eager float32.
    """
    import torch

    from primechat.train.autotune import half_pays, list_devices

    # Set up the candidates.
    shape = shape or PretrainConfig().model
    threads = torch.get_num_threads()
    halves = list_devices(config.device) != ["cpu"] or half_pays()
    dtypes = ("float32", "bfloat16") if halves else ("float32",)
    try:
        runners = []
        candidates = itertools.product(("off", "on"), dtypes)
        for compile_mode, dtype in (*candidates, ("auto", "auto")):
            say(f"setting up: compile {compile_mode}, {dtype}")
            runtime = RuntimeConfig(device=config.device, dtype=dtype, compile=compile_mode)
            runners.append(prepare_runner(shape, runtime))
        for runner in runners:
            runner.turn()  # the first steps of an optimizer allocate its state

        # Measure them in turns.
        say(f"measuring for {config.seconds * len(runners):.0f} s")
        t_end = time.perf_counter() + config.seconds * len(runners)
        while time.perf_counter() < t_end:
            for runner in runners:
                runner.speeds += runner.turn()
    finally:
        torch.set_num_threads(threads)

    # Medians.
    eager = statistics.median(runners[0].speeds)
    rows = []
    for runner in runners:
        speed, chosen = statistics.median(runner.speeds), runner.runtime
        rows.append(
            {
                "run": runner.name,
                "tokens_per_s": round(speed, 1),
                "best": round(max(runner.speeds), 1),
                "ratio": round(speed / eager, 3),
                "steps": len(runner.speeds),
                "compile_s": round(runner.compile_s, 1),
                "device": chosen.device,
                "threads": chosen.threads,
                "micro_rows": chosen.micro_batch_rows,
            }
        )
    return rows


def prepare_runner(shape: GPTConfig, runtime: RuntimeConfig) -> Candidate:
    """Return a candidate with model, optimizer and tuned settings, on random tokens."""
    import torch

    from primechat.model.gpt import GPT
    from primechat.train.autotune import tune_runtime
    from primechat.train.optim import make_optimizer
    from primechat.train.parallel import Ranks
    from primechat.train.rehearsal import draw_batch, rehearse_steps

    # Measure the settings, then start again from fresh weights.
    model = GPT(shape)
    batch = draw_batch(shape, max(1, BATCH_TOKENS // shape.sequence_len))
    tuning = tune_runtime(
        model,
        lambda: make_optimizer(model, OptimConfig()),
        *batch,
        runtime,
        Ranks(),
        seconds=TUNE_SECONDS,
    )
    chosen = tuning.runtime
    model.to("cpu").init_weights(torch.Generator().manual_seed(0))
    model.to(chosen.device)
    optimizer = make_optimizer(model, OptimConfig())

    def turn() -> list[float]:
        torch.set_num_threads(chosen.threads)
        return rehearse_steps(
            optimizer, batch, tuning.loss, chosen, device=chosen.device, steps=TURN_STEPS
        )

    name = f"{'compiled' if chosen.compile == 'on' else 'eager'} {chosen.dtype}"
    name = f"auto: {name}" if runtime.compile == "auto" else name
    return Candidate(name=name, runtime=chosen, compile_s=tuning.compile_s, turn=turn, speeds=[])


def bench_infer(config: BenchConfig, shape: GPTConfig | None = None) -> list[dict[str, Any]]:
    """Return prefill and decode speeds in float32, one row per number of threads, fastest decoding first."""
    import torch

    from primechat.train.autotune import count_cores

    engine, name = open_engine(config, shape or PretrainConfig().model)
    before, rows = torch.get_num_threads(), []
    try:
        for threads in sorted(
            {1, count_cores()} if engine.model.device.type == "cpu" else {before}
        ):
            torch.set_num_threads(threads)
            say(f"measuring {name} with {threads} thread(s)")
            rows.append(
                {"model": name, "threads": threads, **measure_engine(engine, config.seconds)}
            )
    finally:
        torch.set_num_threads(before)
    return sorted(rows, key=lambda row: -float(row["decode_tok_s"]))


def open_engine(config: BenchConfig, shape: GPTConfig) -> tuple[Engine, str]:
    """Return an engine for the named model, or for one with random weights, and its name."""
    import torch

    from primechat.checkpoint import registry
    from primechat.infer.engine import Engine
    from primechat.model.gpt import GPT
    from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
    from primechat.train.autotune import list_devices

    device = "cpu" if config.device == "auto" else list_devices(config.device)[0]
    if config.model:
        model, tokenizer, _ = registry.open_model(config.model, device=device)
        return Engine(model, tokenizer), config.model
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    bytewise = Tokenizer(SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, specials)
    # Opened in the same way as a model from disk.
    drawn = GPT.from_state(shape, dict(model.state_dict()), device=device)
    return Engine(drawn, bytewise), f"random depth {shape.n_layer}"


def measure_engine(engine: Engine, seconds: float) -> dict[str, float]:
    """Return time to first token, and tokens per second of prefill and of decoding 1 row and 32 rows."""

    def write(n_prompt: int, n_new: int, batch: int = 1) -> Callable[[], object]:
        prompt = [(7 * i) % 251 for i in range(n_prompt)]
        return lambda: engine.generate_batch(
            [prompt],
            num_samples=batch,
            max_new_tokens=n_new,
            temperature=1.0,
            top_k=50,
            stop_ids=(),
        )

    def time_tokens() -> float:
        """Return the time of NEW_TOKENS tokens after the first, in seconds."""
        tokens = engine.generate(
            [1] * PROMPT_TOKENS, max_new_tokens=1 + NEW_TOKENS, top_k=50, stop_ids=()
        )
        next(tokens)
        t_start = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - t_start

    # Decoding many rows: the time with new tokens minus the time of the first one.
    share, longest = seconds / 5, engine.model.sequence_len
    first, begun = (repeat_call(write(PROMPT_TOKENS, 1, batch), share) for batch in (1, ROWS))
    more = repeat_call(write(PROMPT_TOKENS, 1 + NEW_TOKENS, ROWS), share)
    rest = max(more - begun, 0.0) or float("nan")
    return {
        "ttft_ms": round(first * 1e3, 2),
        "prefill_tok_s": round(longest / repeat_call(write(longest, 1), share), 1),
        "decode_tok_s": round(NEW_TOKENS / sorted(time_tokens() for _ in range(7))[3], 1),
        f"decode_tok_s_batch_{ROWS}": round(ROWS * NEW_TOKENS / rest, 1),
    }


def bench_tokenizer(
    config: BenchConfig, documents: list[str] | None = None, vocab_size: int = 4096
) -> list[dict[str, Any]]:
    """Return the time to train a tokenizer and its encoding speed in MB per second.

    There is one row for one thread and one for all threads. Without documents, the text that ships with
    primechat is used.
    """
    from primechat.checkpoint import registry
    from primechat.text.corpora import read_documents
    from primechat.text.tokenizer import Tokenizer

    # Training.
    texts = documents or list(read_documents("chitchat", "train", base_dir=registry.base_dir()))
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"training on {n_bytes / 1e6:.1f} MB")
    trained: list[Tokenizer] = []
    train_s = repeat_call(
        lambda: trained.append(Tokenizer.train(texts, vocab_size)), config.seconds
    )

    # Encoding.
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        say(f"encoding with {threads} thread(s)")
        encode = partial(trained[-1].encode_batch, texts, threads=threads)
        rows.append(
            {"threads": threads, "encode_mb_s": n_bytes / 1e6 / repeat_call(encode, config.seconds)}
        )
    shared = {"vocab_size": trained[-1].vocab_size, "text_mb": n_bytes / 1e6, "train_s": train_s}
    return [{**shared, **row} for row in rows]

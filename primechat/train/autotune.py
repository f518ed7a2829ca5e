"""The choice of device, precision, threads, micro-batch and compilation, measured once on a run's own step.

Hides: the search. It takes a tenth of the run, at most ten seconds unless a single step takes longer, and its
result is frozen into the config of the run. On a busy machine a small run can be many times slower with two
threads than with one, which is why this is measured.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from primechat.config import RuntimeConfig
from primechat.errors import ConfigError
from primechat.events import count_noun
from primechat.model.attention import describe_attention
from primechat.model.gpt import GPT
from primechat.train.loop import SumLoss
from primechat.train.optim import Optimizer
from primechat.train.parallel import Ranks, broadcast_object

MakeLoss = Callable[[GPT, RuntimeConfig], SumLoss]
# Time limits of the search: at most, at least, and as a share of the run.
LIMIT_S, LEAST_S, SHARE = 10.0, 2.0, 0.1
MEASURING = "measuring this machine: which number format and how many threads are fastest"
COMPILING = "compiling: the model becomes a faster program"
# The effect of compilation on a 2-core server CPU, assumed where nothing has been measured yet: its
# time in seconds, and the ratio of eager to compiled time.
COMPILE_GUESS = {"compile_s": 45.0, "gain_float32": 1.2, "gain_bfloat16": 1.8}
# The same for a CPU without bfloat16 units, where matrix products dominate the time.
OLDER_GUESS = {**COMPILE_GUESS, "gain_float32": 1.1}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The result of the search: the settings to freeze, the time of an optimizer step, notes on the choice.

    `loss` is the summed loss to train with, compiled if that was chosen. `learned` holds the cost and the
    gain of compilation under the keys of `known` in `tune_runtime`; it is empty if nothing was compiled.
    """

    runtime: RuntimeConfig
    loss: SumLoss
    step_s: float
    compile_s: float
    notes: tuple[str, ...]
    learned: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a micro-batch, and its speed in tokens per second."""

    device: str
    dtype: str
    threads: int
    rows: int
    tokens_per_s: float = 0.0


def count_cores() -> int:
    """Return the maximum number of CPU threads that this process may use."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(
        1, min(torch.get_num_threads(), allowed) if os.environ.get("OMP_NUM_THREADS") else allowed
    )


def list_devices(wanted: str) -> list[str]:
    """Return the devices to try.

    Raises:
        ConfigError: the wanted device is not available.
    """
    here = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
    }
    if wanted != "auto" and not here[wanted]:
        found = ", ".join(name for name, there in here.items() if there)
        raise ConfigError(
            f"runtime.device={wanted!r} is not on this machine, which has {found}; choose one of these."
        )
    if wanted != "auto":
        return [wanted]
    return ["cuda"] if here["cuda"] else ["mps", "cpu"] if here["mps"] else ["cpu"]


def wait_device(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def limit_search(seconds: float) -> float:
    """Return how many seconds the search may take before a run of the given duration.

    >>> [limit_search(s) for s in (5, 30, 3600)]
    [2.0, 3.0, 10.0]
    """
    return min(LIMIT_S, max(LEAST_S, SHARE * seconds))


def threads_pay(threads: int) -> bool:
    """Return whether several threads are worth trying on a whole step.

    On a busy machine threads wait for each other and may multiply small matrices many times slower than one
    thread does. Trying them on a whole step would then take too long.
    """
    x, spent = torch.ones(128, 512), {1: 0.0, threads: 0.0}
    w = torch.ones(512, 512)
    for _ in range(12):
        for n in spent:
            torch.set_num_threads(n)
            t_start = time.perf_counter()
            for _ in range(4):
                x @ w
            spent[n] += time.perf_counter() - t_start
        if spent[threads] > 0.1 + spent[1]:
            return False
    return spent[threads] < 1.5 * spent[1]


def half_pays() -> bool:
    """Return whether bfloat16 is worth trying on this CPU.

    Without units for them, bfloat16 products take up to a hundred times as long as float32 ones, and a whole
    step would use up the time for measuring.
    """
    torch.set_num_threads(1)
    spent = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        spent[dtype] = time_call(partial(torch.matmul, x, w), "cpu", limit_s=0.2)
    return spent[torch.bfloat16] < 4 * spent[torch.float32]


def time_call(
    call: Callable[[], Any], device: str, repeats: int = 3, limit_s: float = 1.0
) -> float:
    """Return the median time of a call in seconds, after one call to warm up.

    There are fewer repeats if the calls together take more than `limit_s`.
    """
    times: list[float] = []
    while len(times) <= repeats and not sum(times) > limit_s:
        t_start = time.perf_counter()
        call()
        wait_device(device)
        times.append(time.perf_counter() - t_start)
    return sorted(times[1:] or times)[len(times[1:]) // 2]


def run_micro(model: GPT, loss: SumLoss, ids: Tensor, targets: Tensor) -> None:
    """Run the forward and backward pass of one micro-batch and drop the gradients."""
    loss(ids, targets).backward()
    model.zero_grad(set_to_none=True)


def settle_model(model: GPT, candidate: Candidate) -> None:
    """Apply the threads, the device and the dtype of a candidate to the model."""
    if candidate.device == "cpu":
        torch.set_num_threads(candidate.threads)
    model.to(candidate.device)
    model.compute_dtype = getattr(torch, candidate.dtype)


def measure_candidate(
    model: GPT, ids: Tensor, targets: Tensor, candidate: Candidate, make: MakeLoss
) -> Candidate:
    """Return the candidate with its speed on these rows (R, T), or 0 if it runs out of memory.

    None of the memory of the measurement is kept.
    """
    settle_model(model, candidate)
    loss = make(model, RuntimeConfig(compile="off"))
    x, y = (t[: candidate.rows].to(candidate.device) for t in (ids, targets))
    try:
        seconds = time_call(lambda: run_micro(model, loss, x, y), candidate.device)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        return candidate
    return replace(candidate, tokens_per_s=x.numel() / seconds)


def tune_runtime(
    model: GPT,
    make_optimizer: Callable[[], Optimizer],
    ids: Tensor,
    targets: Tensor,
    runtime: RuntimeConfig,
    ranks: Ranks,
    *,
    seconds: float = 0.0,
    steps: int = 0,
    known: dict[str, float] | None = None,
    make: MakeLoss | None = None,
    on_phase: Callable[[str, float], None] = lambda name, seconds: None,
) -> Tuning:
    """Return the fastest settings for a run, found by running its own step.

    Args:
        model: a model of the run's shape; its weights are overwritten.
        make_optimizer: makes the run's optimizer; one step of it is measured.
        ids: this rank's rows of one optimizer step (R, T) int64.
        targets: the targets of `ids`, (R, T) int64.
        runtime: settings other than auto or 0 are kept.
        ranks: with several ranks, rank 0's choice applies and the optimizer is not measured.
        seconds: training time of the run, or 0.
        steps: optimizer steps of the run, used if `seconds` is 0.
        known: `compile_s`, `gain_float32`, `gain_bfloat16` as measured here before.
        make: makes the run's loss; None is `make_loss`.
        on_phase: called with the name of each phase and its approximate duration in seconds.

    Returns:
        A `Tuning` whose `runtime` has every setting chosen. The model is left on the chosen device.

    Raises:
        ConfigError: no candidate fits in memory, or the wanted device is not available.
    """
    t_start, make = time.perf_counter(), make or make_loss
    n_rows = len(ids)
    cores = max(1, count_cores() // ranks.world_size)
    one = runtime.threads or 1
    limit_s = limit_search(seconds) if seconds else LIMIT_S
    on_phase(MEASURING, limit_s)
    rows = runtime.micro_batch_rows or min(n_rows, max(1, 1024 // ids.size(1)))
    tried: list[Candidate] = []
    skipped, left_out, guess = False, list[str](), COMPILE_GUESS

    def try_one(candidate: Candidate) -> None:
        nonlocal skipped
        if tried and time.perf_counter() - t_start > limit_s * 0.8:
            skipped = True
        elif candidate not in (replace(c, tokens_per_s=0.0) for c in tried):
            tried.append(measure_candidate(model, ids, targets, candidate, make))

    # Try the devices and dtypes, with one thread on a CPU unless the config says otherwise.
    for device in list_devices(runtime.device):
        dtypes = ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
        if runtime.dtype != "auto":
            dtypes = [runtime.dtype]
        if device == "cpu" and len(dtypes) > 1 and not half_pays():
            dtypes, guess = ["float32"], OLDER_GUESS
            left_out.append("cpu bfloat16 was not tried: this processor has no units for it.")
        for dtype in dtypes:
            n = one if device == "cpu" else cores
            try_one(Candidate(device=device, dtype=dtype, threads=n, rows=rows))
    best = max(tried, key=lambda c: c.tokens_per_s)

    # On a CPU, try all threads.
    if best.device == "cpu" and not runtime.threads and cores > 1:
        if threads_pay(cores):
            try_one(replace(best, threads=cores, tokens_per_s=0.0))
            best = max(tried, key=lambda c: c.tokens_per_s)
        else:
            left_out.append(
                f"{cores} threads were not tried: they wait for other programs of this machine."
            )

    # Try larger micro-batches until one is clearly slower.
    if not runtime.micro_batch_rows:
        sizes = [r for r in (2**i for i in range(12)) if rows < r <= n_rows and n_rows % r == 0]
        for size in sizes:
            try_one(replace(best, rows=size, tokens_per_s=0.0))
            if tried[-1].tokens_per_s < max(c.tokens_per_s for c in tried) * 0.9:
                break
        best = max(tried, key=lambda c: c.tokens_per_s)

    # All ranks take the choice of rank 0.
    best = broadcast_object(best)
    if not best.tokens_per_s:
        raise ConfigError(
            f"A micro-batch of {rows} x {ids.size(1)} tokens does not fit into memory; take a smaller "
            "model or runtime.micro_batch_rows=1."
        )

    # Time a whole step: its micro-batches and the optimizer. If the step has fewer rows than a
    # micro-batch, x holds all of them.
    settle_model(model, best)
    loss = make(model, replace(runtime, compile="off"))
    x, y = (t[: best.rows].to(best.device) for t in (ids, targets))
    micro_s, optim_s = x.numel() / best.tokens_per_s, 0.0
    if ranks.world_size == 1:
        optimizer = make_optimizer()

        def move() -> None:
            loss(x, y).backward()
            optimizer.step(1.0, 0.9)

        optim_s = max(0.0, time_call(move, best.device) - micro_s)
    step_s = n_rows / len(x) * micro_s + optim_s

    # Decide whether to compile, and measure what it brings.
    turn_on, why = decide_compile(
        runtime.compile, best, step_s, seconds, steps, {**guess, **(known or {})}
    )
    chosen = replace(
        runtime,
        device=best.device,
        dtype=best.dtype,
        threads=best.threads,
        micro_batch_rows=best.rows,
        compile="on" if broadcast_object(turn_on) else "off",
    )
    compile_s = 0.0
    learned: dict[str, float] = {}
    if chosen.compile == "on":
        loss = make(model, chosen)
        on_phase(COMPILING, {**guess, **(known or {})}["compile_s"])
        try:
            compile_s = time_call(lambda: run_micro(model, loss, x, y), best.device, repeats=0)
            fast_s = time_call(lambda: run_micro(model, loss, x, y), best.device)
            why += f"; compiled in {compile_s:.0f} s, {micro_s / fast_s:.2f} times as fast"
            slow_s, step_s = step_s, n_rows / len(x) * fast_s + optim_s
            learned = {"compile_s": compile_s, f"gain_{best.dtype}": slow_s / step_s}
        except Exception as error:
            # Whatever made the compiler fail, the eager program still works.
            chosen = replace(chosen, compile="off")
            loss = make(model, chosen)
            why = f"compilation failed ({type(error).__name__}), so the program runs as it is"

    # Describe the search for the log of the run.
    notes = [
        f"{c.device} {c.dtype}, {count_noun(c.threads, 'thread')}, {count_noun(c.rows, 'row')}: "
        f"{c.tokens_per_s:,.0f} tokens/s"
        for c in tried
    ]
    attention = describe_attention(best.device, getattr(torch, best.dtype))
    notes += [
        *left_out,
        f"Chosen: {best.device}, {best.dtype}, {count_noun(best.threads, 'thread')}, "
        f"{count_noun(best.rows, 'row')} at a time; attention: {attention}.",
        f"Compilation {chosen.compile}: {why}.",
    ]
    if skipped:
        notes.append(
            f"Not everything was tried: one step is too long for {limit_s:.0f} s of measuring."
        )
    return Tuning(
        runtime=chosen,
        loss=loss,
        step_s=broadcast_object(step_s),
        compile_s=compile_s,
        notes=tuple(notes),
        learned=learned,
    )


def decide_compile(
    wanted: str, best: Candidate, step_s: float, seconds: float, steps: int, known: dict[str, float]
) -> tuple[bool, str]:
    """Return whether to compile, and why; by default only if it saves more time than it takes."""
    if wanted != "auto":
        return wanted == "on", "as you asked"
    if best.device == "mps":
        return False, "torch.compile brings little on Apple GPUs"
    if best.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return False, "it needs a C++ compiler, and there is none"
    gain, cost = known[f"gain_{best.dtype}"], known["compile_s"]
    total = seconds or steps * step_s
    saved = total - total / gain
    verb = "saves" if saved > cost else "would save"
    return (
        saved > cost,
        f"it takes about {cost:.0f} s and {verb} about {saved:.0f} of {total:,.0f} s",
    )


def make_loss(model: GPT, runtime: RuntimeConfig, bos_id: int = -1) -> SumLoss:
    """Return a model's summed loss, compiled for micro-batches of one shape if `runtime.compile` is on."""
    call = torch.compile(model.loss, dynamic=False) if runtime.compile == "on" else model.loss

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        total: Tensor = call(ids, targets, "sum", bos_id)
        return total

    return loss

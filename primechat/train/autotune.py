"""The choice of device, precision, threads, micro-batch and compilation, measured once on a run's own step.

`tune_runtime` finds the fastest micro-batch (`Search`), times a whole step of it (`time_step`), and compiles
it where that pays (`decide_compile`). This takes a tenth of the run, at most ten seconds unless a single step
takes longer, and the result is frozen into the config of the run. On a busy machine a small run can be many
times slower with two threads than with one, which is why this is measured.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
FIRST_TOKENS = 1024  # of the first micro-batch tried
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
        model: a model of the run's shape; its weights are overwritten, and it stays on the chosen device.
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

    Raises:
        ConfigError: no candidate fits in memory, or the wanted device is not available.
    """
    # The fastest micro-batch; all ranks take the choice of rank 0.
    workload = Workload(model=model, ids=ids, targets=targets, make=make or make_loss)
    search = Search(workload, runtime, ranks, limit_search(seconds) if seconds else LIMIT_S)
    on_phase(MEASURING, search.limit_s)
    best = broadcast_object(search.find_best())
    check_memory(best, ids.size(1))

    # The time of a whole step with it, as plain PyTorch.
    program = time_step(workload, best, runtime, None if ranks.world_size > 1 else make_optimizer)

    # Compilation, where it saves more time than it takes.
    known = {**search.compile_guess, **(known or {})}
    turn_on, why = decide_compile(runtime.compile, best, program.step_s, seconds, steps, known)
    if broadcast_object(turn_on):
        on_phase(COMPILING, known["compile_s"])
        program, why = compile_program(workload, best, program, why)
    return Tuning(
        runtime=program.runtime,
        loss=program.loss,
        step_s=broadcast_object(program.step_s),
        compile_s=program.compile_s,
        notes=describe_search(search, best, program, why),
        learned=program.learned,
    )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured: the model with its loss, and this rank's rows of one optimizer step."""

    model: GPT
    ids: Tensor  # (R, T) int64
    targets: Tensor  # (R, T) int64
    make: MakeLoss

    def take_rows(self, candidate: Candidate) -> tuple[Tensor, Tensor]:
        """Return one micro-batch, ids and targets (b, T), on the candidate's device.

        A step with fewer rows than a micro-batch gives all that it has.
        """
        rows, device = candidate.rows, candidate.device
        return self.ids[:rows].to(device), self.targets[:rows].to(device)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a micro-batch, and its speed in tokens per second."""

    device: str
    dtype: str
    threads: int
    rows: int
    tokens_per_s: float = 0.0


class Search:
    """The candidates tried so far, and what was left out.

    The settings are tried one after the other, each with the best of those before it: device and dtype, then
    threads, then rows.
    """

    def __init__(
        self, workload: Workload, runtime: RuntimeConfig, ranks: Ranks, limit_s: float
    ) -> None:
        self.workload, self.runtime = workload, runtime
        self.cores = max(1, count_cores() // ranks.world_size)
        self.limit_s, self.t_start = limit_s, time.perf_counter()
        self.tried: list[Candidate] = []
        self.left_out: list[str] = []
        self.out_of_time = False
        self.compile_guess = COMPILE_GUESS

    def find_best(self) -> Candidate:
        """Try everything that the config leaves open, and return the fastest candidate."""
        self.try_devices()
        self.try_threads()
        self.try_rows()
        return self.best

    @property
    def best(self) -> Candidate:
        """The fastest candidate so far."""
        return max(self.tried, key=lambda candidate: candidate.tokens_per_s)

    def try_one(self, candidate: Candidate) -> None:
        """Measure a candidate, unless it was measured before or the time is used up."""
        if self.tried and time.perf_counter() - self.t_start > self.limit_s * 0.8:
            self.out_of_time = True
        elif candidate not in (replace(tried, tokens_per_s=0.0) for tried in self.tried):
            self.tried.append(measure_candidate(self.workload, candidate))

    def try_devices(self) -> None:
        """Try the devices and dtypes, with one thread on a CPU unless the config says otherwise."""
        n_rows, sequence_len = self.workload.ids.shape
        first_rows = min(n_rows, max(1, FIRST_TOKENS // sequence_len))
        rows = self.runtime.micro_batch_rows or first_rows
        for device in list_devices(self.runtime.device):
            threads = self.runtime.threads or 1 if device == "cpu" else self.cores
            for dtype in self.list_dtypes(device):
                self.try_one(Candidate(device=device, dtype=dtype, threads=threads, rows=rows))

    def list_dtypes(self, device: str) -> list[str]:
        """Return the dtypes to try on a device."""
        if self.runtime.dtype != "auto":
            return [self.runtime.dtype]
        if device == "cuda":
            return ["bfloat16"]
        if device == "cpu" and not half_pays():
            self.compile_guess = OLDER_GUESS
            self.left_out.append("cpu bfloat16 was not tried: this processor has no units for it.")
            return ["float32"]
        return ["float32", "bfloat16"]

    def try_threads(self) -> None:
        """Try all threads of a CPU, unless the config gives their number."""
        if self.best.device != "cpu" or self.runtime.threads or self.cores == 1:
            return
        if threads_pay(self.cores):
            self.try_one(replace(self.best, threads=self.cores, tokens_per_s=0.0))
        else:
            self.left_out.append(
                f"{self.cores} threads were not tried: they wait for other programs of this machine."
            )

    def try_rows(self) -> None:
        """Try larger micro-batches until one is clearly slower, unless the config gives their size."""
        if self.runtime.micro_batch_rows:
            return
        start, n_rows = self.best, len(self.workload.ids)
        powers = (2**i for i in range(12))
        for rows in (r for r in powers if start.rows < r <= n_rows and n_rows % r == 0):
            self.try_one(replace(start, rows=rows, tokens_per_s=0.0))
            if self.tried[-1].tokens_per_s < 0.9 * self.best.tokens_per_s:
                break


def check_memory(best: Candidate, sequence_len: int) -> None:
    """Check that the fastest candidate ran at all.

    Raises:
        ConfigError: it ran out of memory, as did all others.
    """
    if not best.tokens_per_s:
        raise ConfigError(
            f"A micro-batch of {best.rows} x {sequence_len} tokens does not fit into memory; take a smaller "
            "model or runtime.micro_batch_rows=1."
        )


def measure_candidate(workload: Workload, candidate: Candidate) -> Candidate:
    """Return the candidate with its speed, or 0 if it runs out of memory.

    None of the memory of the measurement is kept.
    """
    model = workload.model
    settle_model(model, candidate)
    loss = workload.make(model, RuntimeConfig(compile="off"))
    x, y = workload.take_rows(candidate)
    try:
        seconds = time_call(lambda: run_micro(model, loss, x, y), candidate.device)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        return candidate
    return replace(candidate, tokens_per_s=x.numel() / seconds)


def settle_model(model: GPT, candidate: Candidate) -> None:
    """Apply the threads, the device and the dtype of a candidate to the model."""
    if candidate.device == "cpu":
        torch.set_num_threads(candidate.threads)
    model.to(candidate.device)
    model.compute_dtype = getattr(torch, candidate.dtype)


def run_micro(model: GPT, loss: SumLoss, ids: Tensor, targets: Tensor) -> None:
    """Run the forward and backward pass of one micro-batch and drop the gradients."""
    loss(ids, targets).backward()
    model.zero_grad(set_to_none=True)


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


def wait_device(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True, kw_only=True)
class Program:
    """The chosen way to run a step, with its measured time; `learned` as in `Tuning`."""

    runtime: RuntimeConfig
    loss: SumLoss
    micro_s: float  # forward and backward pass of one micro-batch
    n_micro: float  # micro-batches of a step
    optim_s: float
    compile_s: float = 0.0
    learned: dict[str, float] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """The seconds of an optimizer step."""
        return self.n_micro * self.micro_s + self.optim_s


def time_step(
    workload: Workload,
    best: Candidate,
    runtime: RuntimeConfig,
    make_optimizer: Callable[[], Optimizer] | None,
) -> Program:
    """Return the fastest candidate as a program that is not compiled.

    Its time is without the optimizer's if `make_optimizer` is None.
    """
    settle_model(workload.model, best)
    loss = workload.make(workload.model, replace(runtime, compile="off"))
    x, y = workload.take_rows(best)
    micro_s, optim_s = x.numel() / best.tokens_per_s, 0.0

    # The optimizer alone cannot be timed: its step needs gradients.
    if make_optimizer:
        optimizer = make_optimizer()

        def move() -> None:
            loss(x, y).backward()
            optimizer.step(1.0, 0.9)

        optim_s = max(0.0, time_call(move, best.device) - micro_s)

    chosen = replace(
        runtime,
        device=best.device,
        dtype=best.dtype,
        threads=best.threads,
        micro_batch_rows=best.rows,
        compile="off",
    )
    n_micro = len(workload.ids) / len(x)
    return Program(runtime=chosen, loss=loss, micro_s=micro_s, n_micro=n_micro, optim_s=optim_s)


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


def compile_program(
    workload: Workload, best: Candidate, eager: Program, why: str
) -> tuple[Program, str]:
    """Return the compiled program with its time, and why; the eager one if compilation fails."""
    chosen, compile_s = replace(eager.runtime, compile="on"), 0.0
    loss = workload.make(workload.model, chosen)
    x, y = workload.take_rows(best)
    run = partial(run_micro, workload.model, loss, x, y)
    try:
        compile_s = time_call(run, best.device, repeats=0)
        micro_s = time_call(run, best.device)
    except Exception as error:
        # Whatever made the compiler fail, the eager program still works.
        why = f"compilation failed ({type(error).__name__}), so the program runs as it is"
        return replace(eager, compile_s=compile_s), why

    fast = replace(eager, runtime=chosen, loss=loss, micro_s=micro_s, compile_s=compile_s)
    learned = {"compile_s": compile_s, f"gain_{best.dtype}": eager.step_s / fast.step_s}
    gain = eager.micro_s / micro_s
    why += f"; compiled in {compile_s:.0f} s, {gain:.2f} times as fast"
    return replace(fast, learned=learned), why


def make_loss(model: GPT, runtime: RuntimeConfig, bos_id: int = -1) -> SumLoss:
    """Return a model's summed loss, compiled for micro-batches of one shape if `runtime.compile` is on."""
    call = torch.compile(model.loss, dynamic=False) if runtime.compile == "on" else model.loss

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        total: Tensor = call(ids, targets, "sum", bos_id)
        return total

    return loss


def describe_search(search: Search, best: Candidate, program: Program, why: str) -> tuple[str, ...]:
    """Return the sentences on a search for the log of the run."""
    tried = [
        f"{c.device} {c.dtype}, {describe_size(c)}: {c.tokens_per_s:,.0f} tokens/s"
        for c in search.tried
    ]
    attention = describe_attention(best.device, getattr(torch, best.dtype))
    chosen = [
        f"Chosen: {best.device}, {best.dtype}, {describe_size(best)} at a time; attention: {attention}.",
        f"Compilation {program.runtime.compile}: {why}.",
    ]
    cut_short = (
        f"Not everything was tried: one step is too long for {search.limit_s:.0f} s of measuring."
    )
    return (*tried, *search.left_out, *chosen, *([cut_short] if search.out_of_time else []))


def describe_size(candidate: Candidate) -> str:
    """Return a candidate's threads and rows in words.

    >>> describe_size(Candidate(device="cpu", dtype="float32", threads=1, rows=8))
    '1 thread, 8 rows'
    """
    return f"{count_noun(candidate.threads, 'thread')}, {count_noun(candidate.rows, 'row')}"


def limit_search(seconds: float) -> float:
    """Return how many seconds the search may take before a run of the given duration.

    >>> [limit_search(s) for s in (5, 30, 3600)]
    [2.0, 3.0, 10.0]
    """
    return min(LIMIT_S, max(LEAST_S, SHARE * seconds))


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

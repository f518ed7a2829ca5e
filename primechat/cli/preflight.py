"""`primechat preflight`: a one-minute test of a rented machine that shows whether the run will work.

The number of GPUs, the disk and the network are checked first. Then all GPUs together take real steps of the
real model, which tests CUDA, the attention kernel, NCCL and the micro-batch, and gives realistic hours and
dollars. Reference: primechat.cloud.plan.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from primechat.checkpoint.registry import base_dir
from primechat.cli.cloud import PlanFlags
from primechat.cloud.plan import Plan, format_hours
from primechat.cloud.ranks import run_job
from primechat.config import PretrainConfig
from primechat.errors import PrimechatError
from primechat.files.paths import make_folder
from primechat.text.shards import HUB_CORPORA, list_shards, probe_sizes

STEPS = 4  # the first ones are for warming up
LIMIT_S = 55.0
WRITE_BYTES = 2**28
SLOW_DISK = 100e6  # bytes per second, at which a checkpoint of a d20 takes a minute
SLOWER = 0.6  # share of the planned speed below which something is wrong with the machine


@dataclass(frozen=True, kw_only=True)
class PreflightFlags(PlanFlags):
    """Test a rented machine in a minute, and refuse before money is spent."""

    cpu_ranks: int = 0
    """Test with so many processes on the CPU instead of the GPUs: to see what this does."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `ok` is None if it is for information only."""

    name: str
    ok: bool | None
    text: str


def run_preflight(flags: PreflightFlags) -> int:
    """Run all checks and print a verdict; return 1 if the run must not be started, else 0."""
    t_start, bad = time.perf_counter(), 0
    for finding in check_machine(flags):
        bad += finding.ok is False
        mark = {True: "ok  ", False: "NO  ", None: "    "}[finding.ok]
        print(f"{mark}{finding.name:12}{finding.text}", flush=True)
    spent_s = time.perf_counter() - t_start
    verdict = (
        f"{bad} thing(s) to mend first: do not start." if bad else "Ready: bash launch.sh start"
    )
    print(f"{verdict} ({spent_s:.0f} s)")
    return 1 if bad else 0


def check_machine(flags: PreflightFlags) -> Iterator[Finding]:
    """Yield the result of each check, cheapest first."""
    import torch

    # GPUs.
    plan = flags.plan()
    wanted = flags.cpu_ranks or plan.machine.n_gpus
    found = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if found else "none"
    enough = bool(flags.cpu_ranks) or found >= wanted
    yield Finding("GPUs", enough, f"{found} of {wanted} wanted ({name}), torch {torch.__version__}")

    # Disk.
    folder = make_folder(base_dir())
    free, need = shutil.disk_usage(folder).free, plan.disk_bytes
    yield Finding(
        "disk",
        free > need,
        f"{free / 1e9:,.0f} GB free in {folder}, the run takes {need / 1e9:,.0f} at most",
    )
    speed = time_writing(folder)
    yield Finding("writing", speed > SLOW_DISK, f"{speed / 1e6:,.0f} MB a second")

    # Network and training steps.
    if flags.run.corpus in HUB_CORPORA:
        yield check_hub(flags.run)
    if enough:
        yield from check_steps(plan, wanted, "cpu" if flags.cpu_ranks else "cuda")


def time_writing(folder: Path) -> float:
    """Return the speed of writing to the disk itself, in bytes per second."""
    block, t_start = os.urandom(2**22), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITE_BYTES / (time.perf_counter() - t_start)


def check_hub(config: PretrainConfig) -> Finding:
    """Return whether the Hub answers a request for the size of a shard."""
    repo, _, _ = HUB_CORPORA[config.corpus]
    try:
        sizes = probe_sizes(repo, list_shards(config.corpus, "train", 1))
        return Finding(
            "text",
            True,
            f"{config.corpus}: the Hub answers, {sum(sizes.values()) / 1e6:,.0f} MB a shard",
        )
    except Exception as error:
        return Finding(
            "text", False, f"{config.corpus}: the Hub does not answer ({str(error)[:80]})"
        )


def check_steps(plan: Plan, ranks: int, device: str) -> Iterator[Finding]:
    """Yield the results of real steps on all ranks, compared with the plan."""
    # Run them.
    rows = max(1, plan.micro_batch_rows)
    runtime = replace(
        plan.config.runtime,
        device=device,
        compile="off",
        micro_batch_rows=rows,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    tokens = ranks * rows * plan.config.model.sequence_len
    try:
        config = replace(plan.config, runtime=runtime, batch_tokens=tokens)
        found = run_job(config, ranks, steps=STEPS, limit_s=LIMIT_S)
    except PrimechatError as error:
        yield Finding("steps", False, str(error))
        return

    # Communication, attention kernel and memory.
    yield Finding("together", found["together"], f"{ranks} ranks over {found['backend']}")
    fast = (
        device == "cpu"
        or "FlashAttention" in found["attention"]
        or plan.machine.name.endswith("4090")
    )
    yield Finding("attention", None if fast else False, found["attention"])
    yield Finding("memory", True, f"{found['memory_bytes'] / 1e9:,.1f} GB at {rows} rows at a time")

    # Speed, and the duration and price of the run at this speed.
    speed = max(found["speeds"])
    seconds = plan.tokens / speed
    cost = f", ${seconds / 3600 * plan.machine.dollars_per_hour:,.0f}" if device == "cuda" else ""
    enough = (
        None
        if device == "cpu"
        else speed * plan.flops_per_token > SLOWER * plan.machine.flops_per_s
    )
    eager = " (not compiled, as here; compiled is faster)"
    yield Finding(
        "speed", enough, f"{speed:,.0f} tokens a second: {format_hours(seconds)}{cost}{eager}"
    )

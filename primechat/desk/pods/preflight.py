"""`primechat preflight`: a minute on a rented machine that tells whether the run will go.

Hides: what is looked at. Counting, disk and network come first; then all GPUs do real steps of the real model
together, which tries CUDA, the attention kernel, NCCL and the micro-batch, and gives the true hours and
dollars. Reference: primechat.cloud.plan.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from primechat.cloud.plan import Plan, format_hours
from primechat.config import PretrainConfig, decode_config, encode_config
from primechat.desk.pods.verbs import PlanFlags
from primechat.store import base_dir
from primechat.text.shards import HUB_CORPORA, list_shards, probe_sizes

STEPS = 4  # the first ones warm up
LIMIT_S = 55.0
WRITE_BYTES = 2**28
SLOW_DISK = 100e6  # bytes a second: a checkpoint of a d20 takes a minute then
SLOWER = 0.6  # of the planned speed: something is wrong with the machine


@dataclass(frozen=True, kw_only=True)
class PreflightFlags(PlanFlags):
    """Test a rented machine in a minute, and refuse before money is spent."""

    cpu_ranks: int = 0
    """Test with so many processes on the CPU instead of the GPUs: to see what this does."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ok is None for what is only told."""

    name: str
    ok: bool | None
    text: str


def run_preflight(flags: PreflightFlags) -> int:
    """Look at everything and print a verdict.

    Returns:
        The exit code: 1 where the run must not be started.
    """
    t_start, bad = time.perf_counter(), 0
    for finding in check_machine(flags):
        bad += finding.ok is False
        mark = {True: "ok  ", False: "NO  ", None: "    "}[finding.ok]
        print(f"{mark}{finding.name:12}{finding.text}", flush=True)
    spent_s = time.perf_counter() - t_start
    verdict = f"{bad} thing(s) to mend first: do not start." if bad else "Ready: bash launch.sh start"
    print(f"{verdict} ({spent_s:.0f} s)")
    return 1 if bad else 0


def check_machine(flags: PreflightFlags) -> Iterator[Finding]:
    """Yield what is found, cheapest first."""
    import torch

    plan = flags.plan()
    wanted = flags.cpu_ranks or plan.machine.n_gpus
    found = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if found else "none"
    enough = bool(flags.cpu_ranks) or found >= wanted
    yield Finding("GPUs", enough, f"{found} of {wanted} wanted ({name}), torch {torch.__version__}")
    folder = base_dir()
    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, plan.disk_bytes
    yield Finding(
        "disk", free > need, f"{free / 1e9:,.0f} GB free in {folder}, the run takes {need / 1e9:,.0f} at most"
    )
    speed = time_writing(folder)
    yield Finding("writing", speed > SLOW_DISK, f"{speed / 1e6:,.0f} MB a second")
    if flags.run.corpus in HUB_CORPORA:
        yield check_hub(flags.run)
    if enough:
        yield from check_steps(plan, wanted, "cpu" if flags.cpu_ranks else "cuda")


def time_writing(folder: Path) -> float:
    """Return the bytes a second that reach the disk itself."""
    block, t_start = os.urandom(2**22), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITE_BYTES / (time.perf_counter() - t_start)


def check_hub(config: PretrainConfig) -> Finding:
    """Ask the Hub for a shard's size."""
    repo, _, _ = HUB_CORPORA[config.corpus]
    try:
        sizes = probe_sizes(repo, list_shards(config.corpus, "train", 1))
        return Finding(
            "text", True, f"{config.corpus}: the Hub answers, {sum(sizes.values()) / 1e6:,.0f} MB a shard"
        )
    except Exception as error:
        return Finding("text", False, f"{config.corpus}: the Hub does not answer ({str(error)[:80]})")


def check_steps(plan: Plan, ranks: int, device: str) -> Iterator[Finding]:
    """Run real steps on all ranks and compare them with the plan."""
    runtime = replace(
        plan.config.runtime, device=device, compile="off", micro_batch_rows=max(1, plan.micro_batch_rows),
        dtype="bfloat16" if device == "cuda" else "float32",
    )  # fmt: skip
    config = replace(plan.config, runtime=runtime)
    done = None
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(encode_config(config), file)
        file.flush()
        words = [
            "--standalone",
            f"--nproc_per_node={ranks}",
            "-m",
            "primechat.desk.pods.preflight",
            file.name,
        ]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *words], capture_output=True, text=True,
                timeout=LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield Finding("steps", False, f"{ranks} ranks did not do {STEPS} steps in {LIMIT_S:.0f} s")
            return
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        yield Finding("steps", False, f"failed: {done.stderr.strip()[-400:]}")
        return
    found: dict[str, Any] = json.loads(lines[-1])
    yield Finding("together", found["sum_ok"], f"{ranks} ranks over {found['backend']}")
    fast = device == "cpu" or "FlashAttention" in found["attention"] or plan.machine.name.endswith("4090")
    yield Finding("attention", None if fast else False, found["attention"])
    yield Finding(
        "memory", True, f"{found['memory_bytes'] / 1e9:,.1f} GB at {runtime.micro_batch_rows} rows at a time"
    )
    real = found["tokens_per_s"] * plan.flops_per_token
    hours = plan.tokens / found["tokens_per_s"]
    cost = f", ${hours / 3600 * plan.machine.dollars_per_hour:,.0f}" if device == "cuda" else ""
    enough = None if device == "cpu" else real > SLOWER * plan.machine.flops_per_s
    eager = " (not compiled, as here; compiled is faster)"
    yield Finding(
        "speed", enough, f"{found['tokens_per_s']:,.0f} tokens a second: {format_hours(hours)}{cost}{eager}"
    )


def run_rank(config: PretrainConfig) -> None:
    """Be one rank of the steps, and print what rank 0 found as a line of JSON."""
    import torch
    import torch.distributed as dist

    from primechat.model.attention import describe_attention
    from primechat.model.gpt import GPT
    from primechat.train.loop import fit
    from primechat.train.optim import Optimizer
    from primechat.train.parallel import SpreadLoss, join_ranks, sum_numbers

    device, shape, runtime = config.runtime.device, config.model, config.runtime
    ranks = join_ranks(device)
    place = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device(device)
    total = sum_numbers([float(ranks.rank)], place)[0]
    draw = torch.Generator(place).manual_seed(0)
    with place:
        model = GPT(shape)
    model.init_weights(draw)
    dtype = model.compute_dtype = getattr(torch, runtime.dtype)
    optimizer = Optimizer(model, config.optim, shape.n_embd, half=dtype == torch.bfloat16)
    ids = torch.randint(
        shape.vocab_size, (runtime.micro_batch_rows, shape.sequence_len), generator=draw, device=place
    )
    speeds: list[float] = []
    loss = SpreadLoss(model, lambda x, y: model.loss(x, y, "sum"))
    fit(
        optimizer, itertools.repeat((ids, ids)), loss, steps=STEPS, device=place,
        micro_batch_rows=runtime.micro_batch_rows, on_step=lambda event: speeds.append(event.tokens_per_s),
    )  # fmt: skip
    if ranks.is_main:
        found = {
            "sum_ok": total == sum(range(ranks.world_size)),
            "tokens_per_s": sorted(speeds[1:])[len(speeds) // 2],
            "backend": dist.get_backend() if dist.is_initialized() else "one process alone",
            "attention": describe_attention(device, dtype),
            "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(decode_config(json.loads(Path(sys.argv[1]).read_text()), PretrainConfig))

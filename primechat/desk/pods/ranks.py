"""What it costs to spread a run over processes: ranks of one thread each against one process of all threads.

Hides: how they take turns. Each turn is a job of its own under torchrun, one kind after the other, so that
what else the machine does falls on both. Run as a module it is one rank. Reference: primechat.train.parallel.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

import primechat
from primechat.config import OptimConfig, PretrainConfig
from primechat.errors import PrimechatError

ROUNDS, WARM_STEPS = 4, 2
BATCH_TOKENS, MICRO_ROWS = 8192, 8


def bench_ranks(seconds: float, *, depth: int = 0) -> list[dict[str, Any]]:
    """Return tokens a second of one process with all threads and of as many ranks with one thread each.

    Args:
        seconds: to measure each kind in each number format, the start of the jobs apart.
        depth: blocks of the model; 0 is the depth-4 model.

    Returns:
        Two rows a number format; `ratio` is to the single process's median.
    """
    from primechat.train.tune import count_cores, half_pays

    cores, rows = max(2, count_cores()), []
    for dtype in ("float32", "bfloat16") if half_pays() else ("float32",):
        speeds: dict[int, list[float]] = {1: [], cores: []}
        for _ in range(ROUNDS):
            for ranks in speeds:
                speeds[ranks] += run_job(ranks, cores // ranks, dtype, seconds / ROUNDS, depth)
        alone = statistics.median(speeds[1])
        for ranks, found in speeds.items():
            speed = statistics.median(found)
            row = {"run": f"{ranks} x {cores // ranks} threads, {dtype}", "tokens_per_s": round(speed, 1)}
            rows.append(row | {"ratio": round(speed / alone, 3), "steps": len(found)})
    return rows


def run_job(ranks: int, threads: int, dtype: str, seconds: float, depth: int) -> list[float]:
    """Run one job to its end and return the tokens a second of each step, over all ranks together."""
    words = ["--standalone", f"--nproc_per_node={ranks}", "-m", __name__, str(threads), dtype]
    root = str(Path(primechat.__file__).parent.parent)
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(seconds), str(depth)]
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise PrimechatError(f"{ranks} ranks did not train: {done.stderr.strip()[-300:]}")
    return list(json.loads(lines[-1]))


def train_rank(threads: int, dtype: str, seconds: float, depth: int) -> None:
    """Train on random tokens as one rank; the first prints each step's tokens a second."""
    import threading
    import time

    import torch

    from primechat.config import GPTConfig
    from primechat.model.gpt import GPT
    from primechat.records import StepEvent
    from primechat.text.batches import share_rows
    from primechat.train.loop import fit
    from primechat.train.optim import Optimizer
    from primechat.train.parallel import SpreadLoss, join_ranks

    torch.set_num_threads(threads)
    ranks, shape = join_ranks("cpu"), PretrainConfig().model
    shape = GPTConfig.modern(depth, vocab_size=300, sequence_len=32, head_dim=16) if depth else shape
    first, share = share_rows(BATCH_TOKENS // shape.sequence_len, ranks.rank, ranks.world_size)
    draw, model = torch.Generator().manual_seed(ranks.rank), GPT(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype = getattr(torch, dtype)
    text = torch.randint(shape.vocab_size, (share, shape.sequence_len + 1), generator=draw)
    speeds: list[float] = []
    stop, t_start = threading.Event(), time.perf_counter()

    def note(event: StepEvent) -> None:
        speeds.append(event.tokens_per_s)
        if len(speeds) > WARM_STEPS and time.perf_counter() - t_start > seconds:
            stop.set()

    fit(
        Optimizer(model, OptimConfig(), shape.n_embd, half=dtype == "bfloat16"),
        repeat((text[:, :-1].contiguous(), text[:, 1:].contiguous())),
        SpreadLoss(model, lambda x, y: model.loss(x, y, "sum")), steps=10_000, micro_batch_rows=MICRO_ROWS,
        on_step=note, stop=stop,
    )  # fmt: skip
    if ranks.is_main:
        print(json.dumps(speeds[WARM_STEPS:]), flush=True)
    if ranks.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train_rank(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))

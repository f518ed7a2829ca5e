"""Jobs on random tokens under torchrun: whether a run works on several processes, and what that costs.

The kinds of job are measured in turn, each turn a new job, so that other load on the machine affects them
alike. Run as a module, this file is one rank. Reference: primechat.train.parallel.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

from primechat.config import GPTConfig, PretrainConfig, RuntimeConfig, decode_config, encode_config
from primechat.errors import PrimechatError
from primechat.files.paths import CLONE

ROUNDS, WARM_STEPS = 4, 2
BATCH_TOKENS, MICRO_ROWS = 8192, 8


def bench_ranks(seconds: float, *, depth: int = 0) -> list[dict[str, Any]]:
    """Return the tokens per second of one process with all threads and of one rank per core.

    Args:
        seconds: time of each measurement, without the start of its jobs.
        depth: layers of a tiny model; 0 means the default model of depth 4.

    Returns:
        Two rows per number format, with `ratio` to the median speed of the single process.
    """
    from primechat.train.autotune import count_cores, half_pays

    job = PretrainConfig(batch_tokens=BATCH_TOKENS)
    if depth:
        job = replace(
            job, model=GPTConfig.modern(depth, vocab_size=300, sequence_len=32, head_dim=16)
        )
    cores, rows = max(2, count_cores()), []
    for dtype in ("float32", "bfloat16") if half_pays() else ("float32",):
        speeds: dict[int, list[float]] = {1: [], cores: []}
        runtime = RuntimeConfig(device="cpu", dtype=dtype, micro_batch_rows=MICRO_ROWS)
        for _ in range(ROUNDS):
            for ranks in speeds:
                one = replace(job, runtime=replace(runtime, threads=cores // ranks))
                speeds[ranks] += run_job(one, ranks, seconds=seconds / ROUNDS)["speeds"]
        alone = statistics.median(speeds[1])
        for ranks, found in speeds.items():
            speed = statistics.median(found)
            row = {
                "run": f"{ranks} x {cores // ranks} threads, {dtype}",
                "tokens_per_s": round(speed, 1),
            }
            rows.append(row | {"ratio": round(speed / alone, 3), "steps": len(found)})
    return rows


def run_job(
    config: PretrainConfig,
    ranks: int,
    *,
    steps: int = 10_000,
    seconds: float = 1e6,
    limit_s: float = 1e6,
) -> dict[str, Any]:
    """Return rank 0's measurements of a job that trains on random tokens for some steps or seconds.

    Returns:
        `speeds`, the tokens per second of each step over all ranks, without the first two; `together`,
        whether a sum over the ranks is right; `backend`, `attention`, `memory_bytes`.

    Raises:
        PrimechatError: the job failed, or took longer than `limit_s`.
    """
    words = [
        "--standalone",
        f"--nproc_per_node={ranks}",
        "-m",
        __name__,
        json.dumps(encode_config(config)),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(steps), str(seconds)]
    env = {**os.environ, "PYTHONPATH": str(CLONE)}
    if config.runtime.threads:
        env["OMP_NUM_THREADS"] = str(config.runtime.threads)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as job:
        try:
            out, err = job.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise PrimechatError(
                f"{ranks} ranks did not do {steps} steps in {limit_s:.0f} s"
            ) from None
        finally:
            job.terminate()  # a killed torchrun would leave its ranks on the GPUs
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if job.returncode or not lines:
        raise PrimechatError(f"{ranks} ranks did not train: {err.strip()[-400:]}")
    return dict(json.loads(lines[-1]))


def train_rank(config: PretrainConfig, steps: int, seconds: float) -> None:
    """Train as one rank; rank 0 prints its measurements as a line of JSON."""
    import torch
    import torch.distributed as dist

    from primechat.model.attention import describe_attention
    from primechat.model.gpt import GPT
    from primechat.text.batches import split_rows
    from primechat.train.optim import make_optimizer
    from primechat.train.parallel import SpreadLoss, join_ranks, sum_numbers
    from primechat.train.rehearsal import draw_batch, rehearse_steps

    shape, runtime, device = config.model, config.runtime, config.runtime.device
    ranks = join_ranks(device)
    place = torch.device(device, ranks.local_rank) if device == "cuda" else torch.device(device)
    torch.set_num_threads(runtime.threads or torch.get_num_threads())
    total = sum_numbers([float(ranks.rank)], place)[0]
    with place:
        model = GPT(shape)
    model.init_weights(torch.Generator(place).manual_seed(0))
    dtype = model.compute_dtype = getattr(torch, runtime.dtype)
    _, rows = split_rows(config.batch_tokens // shape.sequence_len, ranks.rank, ranks.world_size)
    speeds = rehearse_steps(
        make_optimizer(model, config.optim),
        draw_batch(shape, rows, seed=ranks.rank, device=place),
        SpreadLoss(model, lambda x, y: model.loss(x, y, "sum")),
        runtime,
        device=place,
        steps=steps,
        seconds=seconds,
        least_steps=WARM_STEPS + 1,
    )
    if ranks.is_main:
        found = {
            "speeds": speeds[WARM_STEPS:],
            "together": total == sum(range(ranks.world_size)),
            "backend": dist.get_backend() if dist.is_initialized() else "one process alone",
            "attention": describe_attention(device, dtype),
            "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        }
        sys.stdout.write(json.dumps(found) + "\n")  # for `run_job`, which reads the last line


if __name__ == "__main__":
    train_rank(
        decode_config(json.loads(sys.argv[1]), PretrainConfig), int(sys.argv[2]), float(sys.argv[3])
    )

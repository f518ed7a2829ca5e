"""One measurement of test_plan.test_memory: the peak memory of two optimizer steps, less what was there."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

from primechat.config import OptimConfig, PretrainConfig, decode_config
from primechat.model.gpt import GPT
from primechat.train.loop import fit
from primechat.train.optim import Optimizer


def read_status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def train(config: PretrainConfig, steps: int) -> None:
    """Train on random tokens."""
    torch.set_num_threads(1)
    draw, shape = torch.Generator().manual_seed(0), config.model
    model = GPT(shape)
    model.init_weights(draw)
    model.compute_dtype = getattr(torch, config.runtime.dtype)
    rows = config.batch_tokens // shape.sequence_len
    ids = torch.randint(shape.vocab_size, (rows, shape.sequence_len), generator=draw)
    optimizer = Optimizer(
        model, OptimConfig(), shape.n_embd, half=model.compute_dtype == torch.bfloat16
    )
    fit(
        optimizer,
        itertools.repeat((ids, ids)),
        lambda x, y: model.loss(x, y, "sum"),
        steps=steps,
        micro_batch_rows=config.runtime.micro_batch_rows,
    )


if __name__ == "__main__":
    config = decode_config(json.loads(sys.argv[1]), PretrainConfig)
    tiny = decode_config(json.loads(sys.argv[2]), PretrainConfig)
    train(tiny, 2)  # loads what torch loads late
    before = read_status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(config, 2)
    print(read_status("VmHWM:") - before)

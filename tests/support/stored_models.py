"""Checkpoints of a tiny model with random weights, written into a run directory without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from primechat.checkpoint.checkpoint import save_checkpoint
from primechat.checkpoint.nanochat_format import list_shapes
from primechat.config import GPTConfig

CONFIG = GPTConfig.modern(1, vocab_size=265, sequence_len=32, head_dim=64)


def make_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) for key, shape in list_shapes(CONFIG).items()
    }


def make_run(root: Path, run: str, steps: tuple[int, ...] = (1,), **meta: Any) -> Path:
    """Write checkpoints of a tiny model; the weights of step n have seed n."""
    for step in steps:
        save_checkpoint(
            root / run,
            step,
            model_state=make_state(step),
            config=CONFIG,
            optim_state=None,
            meta=meta,
        )
    return root / run

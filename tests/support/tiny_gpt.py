"""A tiny GPT and a text that it learns at once, for tests of the optimizer, the loop and several ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from primechat.config import GPTConfig
from primechat.model.gpt import GPT

# three layers: with fewer, backout changes nothing and its gradient is a rounding error
SHAPE = replace(
    GPTConfig.modern(3, vocab_size=70, sequence_len=16, head_dim=16),
    n_embd=32,
    n_head=2,
    n_kv_head=2,
)


def make_model(seed: int = 0) -> GPT:
    """A tiny model with noise on every weight: behind zero outputs, gradients would be rounding errors."""
    model, generator = GPT(SHAPE), torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model


def make_batches(rows: int = 4, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A learnable text: token i is followed by token (3 i + 1) mod 61; some targets are ignored."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(50):
        ids = np.empty((rows, 17), dtype=np.int64)
        ids[:, 0] = rng.integers(61, size=rows)
        for t in range(16):
            ids[:, t + 1] = (3 * ids[:, t] + 1) % 61
        targets = ids[:, 1:].copy()
        targets[rng.random(targets.shape) < 0.2] = -1
        batches.append((torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets)))
    return batches[start:]

"""Bits per byte: how well a model predicts a text, whatever its tokenizer.

Hides: which targets count. Special tokens and ignored targets count on neither side. Reference: nanochat's
evaluation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The sums behind a measurement; two of them add up."""

    nats: float = 0.0
    tokens: int = 0
    n_bytes: int = 0

    @property
    def bpb(self) -> float:
        """Bits per byte: nats / (ln 2 * bytes)."""
        return self.nats / (math.log(2) * self.n_bytes) if self.n_bytes else math.nan

    @property
    def loss_nats(self) -> float:
        """Mean nats a scored token."""
        return self.nats / self.tokens if self.tokens else math.nan


def measure_bits(
    token_loss: Callable[[Tensor, Tensor], Tensor],
    windows: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> Bits:
    """Score windows of text.

    Args:
        token_loss: (ids, targets) -> nats (B, T), 0 where the target is ignored.
        windows: batches (ids, targets), (B, T) int64; a target of -1 is not scored.
        byte_lengths: (V,) bytes of each token; 0 (special tokens) is not scored.
        device: where the model is.
        on_batch: called with the tokens scored so far.
        stop: when set, ends early with what has been scored.

    Returns:
        The sums; `.bpb` is their quotient.

    Source: bpb = sum of nats / (ln 2 * sum of target bytes).
    """
    lengths = torch.from_numpy(np.asarray(byte_lengths, dtype=np.int64))
    nats, tokens, n_bytes = 0.0, 0, 0
    for ids, targets in windows:
        if stop is not None and stop.is_set():
            break
        sizes = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)
        with torch.no_grad():
            losses = token_loss(ids.to(device), targets.to(device)).cpu()
        nats += float(losses[sizes > 0].double().sum())
        tokens += int((sizes > 0).sum())
        n_bytes += int(sizes.sum())
        if on_batch:
            on_batch(tokens)
    return Bits(nats=nats, tokens=tokens, n_bytes=n_bytes)

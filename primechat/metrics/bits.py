"""Bits per byte: how well a model predicts a text, independent of its tokenizer.

Special tokens and ignored targets count neither as loss nor as bytes. Reference: nanochat's evaluation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The sums from which bits per byte and mean loss are computed."""

    nats: float = 0.0
    tokens: int = 0
    n_bytes: int = 0

    @property
    def bpb(self) -> float:
        """Bits per byte: nats / (ln 2 * bytes)."""
        return self.nats / (math.log(2) * self.n_bytes) if self.n_bytes else math.nan

    @property
    def loss_nats(self) -> float:
        """Mean loss in nats per scored token."""
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
    """Return the summed loss, tokens and bytes of a text's windows; `.bpb` is the bits per byte.

    Args:
        token_loss: function of (ids, targets) that returns nats (B, T), 0 where the target is ignored.
        windows: batches (ids, targets), (B, T) int64; a target of -1 is not scored.
        byte_lengths: (V,) bytes of each token; tokens of 0 bytes (special tokens) are not scored.
        device: where the model is.
        on_batch: called with the number of tokens scored so far.
        stop: once set, scoring ends after the current batch.

    Source: bpb = sum of nats / (ln 2 * sum of target bytes).
    """
    rows: list[np.ndarray] = []
    tokens = 0
    for scored in score_windows(token_loss, windows, byte_lengths, device=device, stop=stop):
        rows.append(scored)
        tokens += int(scored[:, 1].sum())
        if on_batch:
            on_batch(tokens)
    return sum_windows(rows)


def score_windows(
    token_loss: Callable[[Tensor, Tensor], Tensor],
    windows: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    stop: threading.Event | None = None,
) -> Iterator[np.ndarray]:
    """Yield nats, tokens and bytes of each window, float64 (B, 3) per batch; Args as in `measure_bits`."""
    lengths = torch.from_numpy(np.asarray(byte_lengths, dtype=np.int64))
    for ids, targets in windows:
        sizes = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)  # (B, T)
        with torch.no_grad():
            losses = token_loss(ids.to(device), targets.to(device)).cpu()
        nats = torch.where(sizes > 0, losses.double(), 0.0)
        columns = (nats.sum(1), (sizes > 0).sum(1), sizes.sum(1))
        yield torch.stack([column.double() for column in columns], dim=1).numpy()
        if stop is not None and stop.is_set():
            return


def sum_windows(scored: Iterable[np.ndarray]) -> Bits:
    """Return the sums over arrays of windows (B, 3), rounded once, so that their order does not matter."""
    rows = np.concatenate([np.zeros((0, 3)), *scored])
    nats, tokens, n_bytes = (math.fsum(column) for column in rows.T)
    return Bits(nats=nats, tokens=int(tokens), n_bytes=int(n_bytes))

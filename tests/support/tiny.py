"""Small stand-ins that tests share: a tokenizer of bytes and two models that need no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes and the nine special tokens."""
    return Tokenizer(
        SPLIT_PATTERN,
        {bytes([i]): i for i in range(256)},
        {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)},
    )


class HistoryCache:
    """A cache that keeps the tokens themselves."""

    def __init__(self, rows: list[list[int]], capacity: int) -> None:
        self.rows, self.capacity = rows, capacity

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def select(self, rows: Sequence[int]) -> HistoryCache:
        return HistoryCache([list(self.rows[i]) for i in rows], self.capacity)

    def keep(self, rows: Sequence[int]) -> HistoryCache:
        return self.select(rows)

    def join(self, others: Sequence[HistoryCache]) -> HistoryCache:
        caches = [self, *others]
        return HistoryCache(
            [list(row) for c in caches for row in c.rows], max(c.capacity for c in caches)
        )


class HistoryModel:
    """A model whose logits depend on every token of the history; `calls` notes the shape of each pass."""

    def __init__(
        self, vocab_size: int = VOCAB_SIZE, sequence_len: int = 16, max_context: int = 160
    ) -> None:
        self.vocab_size, self.sequence_len, self.max_context = vocab_size, sequence_len, max_context
        self.device = torch.device("cpu")
        self.calls: list[tuple[int, int]] = []
        self.on_advance: Callable[[], Any] = lambda: None

    def new_cache(self, batch_size: int, capacity: int) -> HistoryCache:
        assert capacity <= self.max_context, "no cache is larger than the context"
        return HistoryCache([[] for _ in range(batch_size)], capacity)

    def advance(self, ids: torch.Tensor, cache: HistoryCache) -> torch.Tensor:
        assert torch.is_inference_mode_enabled(), "the engine computes without gradients"
        assert ids.dtype == torch.int64, "ids are int64"
        self.on_advance()
        self.calls.append((ids.shape[0], ids.shape[1]))
        for row, new in zip(cache.rows, ids.tolist(), strict=True):
            row.extend(new)
            assert len(row) <= cache.capacity, "the cache is full"
        return torch.stack([self.score(row) for row in cache.rows])

    def score(self, row: list[int]) -> torch.Tensor:
        """Return the logits (V,) that follow a history."""
        seed = 0
        for i in row:
            seed = (seed * 1_000_003 + i + 1) % 2**31
        return 2 * torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))


class ScriptModel(HistoryModel):
    """A model that writes a script after any prompt that ends in the byte or token `cue`, token by token."""

    def __init__(self, script: Sequence[int], cue: int, **kind: int) -> None:
        super().__init__(**kind)
        self.script, self.cue = list(script), cue

    def score(self, row: list[int]) -> torch.Tensor:
        at = len(row) - 1 - row[::-1].index(self.cue)
        place = len(row) - 1 - at
        logits = torch.zeros(self.vocab_size)
        logits[self.script[min(place, len(self.script) - 1)]] = 40.0
        return logits


def measure_prediction(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return entropy and varentropy of predictions (..., V) by the plain formula, in float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    logp = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    p, finite = np.exp(logp), np.where(np.isneginf(logp), 0.0, logp)
    entropy = -(p * finite).sum(axis=-1)
    return entropy, (p * (finite + entropy[..., None]) ** 2).sum(axis=-1)

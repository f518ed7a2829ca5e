"""The cache of keys and values of the text that a model has read.

Attention at a new token needs the keys and values of all tokens before it. They do not change, so they are
stored instead of recomputed. The rows of a batch may differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of every layer, and the last embedding, which smearing the next token needs.

    keys and values are (L, B, K, S, D), with room for S tokens per row; row b holds `lengths[b]` tokens.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        **kind: Any,
    ) -> None:
        shape = (n_layer, batch_size, n_kv_head, capacity, head_dim)
        self.keys, self.values = torch.zeros(shape, **kind), torch.zeros(shape, **kind)
        self.lengths: list[int] = [0] * batch_size
        self.last_embed: Tensor | None = None  # (B, C), before the smear

    @property
    def capacity(self) -> int:
        """Number of tokens that each row can hold."""
        return self.keys.size(3)

    @property
    def is_even(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return min(self.lengths) == max(self.lengths)

    # ---- reading and writing

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values (B, T, K, D) after the tokens that each row holds.

        `lengths` does not change here; the model adds T to it once all layers have written.
        """
        B, T = k.shape[:2]
        keys, values = self.keys[layer], self.values[layer]  # (B, K, S, D)
        if self.is_even:
            start = self.lengths[0]
            keys[:, :, start : start + T] = k.transpose(1, 2)
            values[:, :, start : start + T] = v.transpose(1, 2)
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            first = torch.tensor(self.lengths, device=k.device)[:, None]
            places = first + torch.arange(T, device=k.device)  # (B, T)
            keys[rows, :, places] = k.to(keys.dtype)
            values[rows, :, places] = v.to(values.dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, T, K, D) and return all that a row may read, (B, S, K, D) each."""
        self.store(layer, k, v)
        if max(self.lengths) == 0:
            return k, v  # the cache was empty
        stop = max(self.lengths) + k.size(1)
        keys, values = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]
        return keys.transpose(1, 2), values.transpose(1, 2)

    # ---- selecting and joining rows

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of the given rows, in that order; a row may be given several times."""
        index = torch.tensor(rows, device=self.keys.device)
        return self._with(
            self.keys.index_select(1, index),
            self.values.index_select(1, index),
            [self.lengths[i] for i in rows],
            None if self.last_embed is None else self.last_embed.index_select(0, index),
        )

    def keep(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of the given rows only, sharing this cache's memory.

        Args:
            rows: n row indices; each index i < n among them must be at place i. The other rows move to the
                places of dropped rows, and only those are copied.
        """
        for i, source in enumerate(rows):
            if i != source:
                n = self.lengths[source]
                self.keys[:, i, :, :n] = self.keys[:, source, :, :n]
                self.values[:, i, :, :n] = self.values[:, source, :, :n]
        return self._with(
            self.keys[:, : len(rows)],
            self.values[:, : len(rows)],
            [self.lengths[i] for i in rows],
            None if self.last_embed is None else self.last_embed[list(rows)],
        )

    def join(self, others: Sequence[KVCache]) -> KVCache:
        """Return one cache with the rows of this one followed by those of `others`, of any lengths."""
        caches = [self, *others]
        capacity = max(cache.capacity for cache in caches)

        def pad(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, capacity - x.size(3)))

        embeds = [cache.last_embed for cache in caches if cache.last_embed is not None]
        return self._with(
            torch.cat([pad(cache.keys) for cache in caches], dim=1),
            torch.cat([pad(cache.values) for cache in caches], dim=1),
            [n for cache in caches for n in cache.lengths],
            torch.cat(embeds) if len(embeds) == len(caches) else None,
        )

    def part(self, start: int, stop: int) -> KVCache:
        """Return an empty cache that uses the memory of rows `start` to `stop` of this one."""
        keys, values = self.keys[:, start:stop], self.values[:, start:stop]
        return self._with(keys, values, [0] * (stop - start), None)

    def adopt(self, parts: Sequence[KVCache]) -> None:
        """Take over the lengths and last embeddings of `parts`, which together make up this cache."""
        self.lengths = [n for part in parts for n in part.lengths]
        embeds = [part.last_embed for part in parts if part.last_embed is not None]
        self.last_embed = torch.cat(embeds) if embeds else None

    def _with(
        self, keys: Tensor, values: Tensor, lengths: list[int], last_embed: Tensor | None
    ) -> KVCache:
        """Return a cache made of these tensors and lengths."""
        cache = KVCache.__new__(KVCache)
        cache.keys, cache.values = keys, values
        cache.lengths, cache.last_embed = lengths, last_embed
        return cache

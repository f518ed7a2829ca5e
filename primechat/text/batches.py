"""Batches of token ids: rows cut from one stream, rows packed by best fit, or one conversation per row.

The documents of an epoch, shuffled and each preceded by <|bos|>, form one endless stream that continues into
the next epoch. Row i holds tokens i*T to i*T+T-1 and its targets are shifted by one, so nothing is padded,
cut off or read twice. A cursor is a position in the stream: a run resumes at exactly the next token. Best fit
(packing.py) begins each row with a document instead, and cuts off what does not fit.
Reference: Brown et al. 2020, Language Models are Few-Shot Learners, appendix B (packing without padding).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from primechat.errors import ConfigError, DataError
from primechat.events import OnEvent
from primechat.text.packing import BLOCK_DOCUMENTS, pack_best_fit, pack_groups
from primechat.text.shards import ShardFeed
from primechat.text.tokenizer import Tokenizer
from primechat.text.tokens import Group, TokenCache, read_groups
from primechat.text.tokens import build_cache as build_cache

Cursor = dict[str, int]
Batch = tuple[torch.Tensor, torch.Tensor]
GROUPS_AHEAD = 3  # row groups tokenised in advance


# Batches from a token cache


class PackedBatches(Iterator[Batch]):
    """Endless batches from a token cache: documents reshuffled each epoch, rows cut from one stream.

    The rows of an epoch are shuffled too; otherwise a long document would fill several consecutive steps.
    """

    waste = 0.0  # share of tokens that are never a target: none, the stream has no gaps

    def __init__(
        self,
        cache: TokenCache,
        *,
        sequence_len: int,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        cursor: Cursor | None = None,
    ) -> None:
        """Start at the beginning of epoch 0, or at a cursor.

        Args:
            cache: Token cache to read from.
            sequence_len: Tokens per row, T.
            rows: Rows per optimizer step over all ranks; this rank yields its even share, R.
            rank: Index of this process.
            world_size: Number of processes.
            seed: Seed of the shuffles.
            cursor: Earlier value of `cursor`, from any rank and any number of ranks.

        Raises:
            ConfigError: There are fewer rows than ranks.
            DataError: The cursor is outside this cache.
        """
        self.first, self.rank_rows = split_rows(rows, rank, world_size)
        self.cache, self.sequence_len, self.rows, self.seed = cache, sequence_len, rows, seed
        position = dict(cursor or {"epoch": 0, "position": 0})
        if set(position) != {"epoch", "position"} or not 0 <= position["position"] < cache.tokens:
            total = cache.tokens
            raise DataError(
                f"cursor={cursor!r:.60} is no place in a stream of {total} tokens; start anew."
            )
        self._epoch, self._position = position["epoch"], position["position"]
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, np.ndarray] = {}

    @property
    def cursor(self) -> Cursor:
        """Position of the next token, JSON-ready and equal on every rank."""
        return {"epoch": self._epoch, "position": self._position}

    def __next__(self) -> Batch:
        """Return ids and targets, int64 (R, T); a target of -1 is ignored by the loss."""
        T, tokens = self.sequence_len, self.cache.tokens

        # This rank's rows, counted from the start of epoch 0.
        first = (self._epoch * tokens + self._position) // T + self.first
        parts = []
        for row in range(first, first + self.rank_rows):
            epoch, position = divmod(self._pick(row) * T, tokens)
            parts.append(self._take(epoch, position, T + 1))

        # Every rank advances past the rows of all ranks.
        passed, self._position = divmod(self._position + self.rows * T, tokens)
        self._epoch += passed

        ids = np.stack([part for part, _ in parts])  # (R, T + 1)
        targets = np.stack(
            [t[1:] if m is None else np.where(m[1:] == 0, -1, t[1:]) for t, m in parts]
        )
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)

    def _pick(self, row: int) -> int:
        """Return the row of the stream that is read as the `row`-th, shuffled within its epoch."""
        T, tokens = self.sequence_len, self.cache.tokens
        epoch = row * T // tokens
        start, end = -(-epoch * tokens // T), -(-(epoch + 1) * tokens // T)
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch, 1]).permutation(end - start)
            self._orders = {e: old for e, old in self._orders.items() if e == epoch - 1} | {
                epoch: order
            }
        return start + int(self._orders[epoch][row - start])

    def _take(self, epoch: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return `count` tokens of the stream from a position on, int64, and their mask."""
        places = []
        while count:
            part = min(count, self.cache.tokens - position)
            places.append(self._locate(epoch, position, part))
            epoch, position, count = epoch + 1, 0, count - part
        where = np.concatenate(places)
        mask = None if self.cache.mask is None else self.cache.mask[where]
        return self.cache.ids[where].astype(np.int64), mask

    def _locate(self, epoch: int, position: int, count: int) -> np.ndarray:
        """Return the indices in the cache of `count` tokens of one epoch's stream."""
        # How the epoch's documents are ordered: where each ends in the stream, and the shift to the cache.
        if epoch not in self._plans:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.cache.documents)
            begins = self.cache.offsets[order]
            ends = np.cumsum(self.cache.offsets[order + 1] - begins)
            shift = begins - np.concatenate([[0], ends[:-1]])
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = (ends, shift)

        # Shift each of the documents that these tokens touch.
        ends, shift = self._plans[epoch]
        first = int(np.searchsorted(ends, position, side="right"))
        last = int(np.searchsorted(ends, position + count - 1, side="right"))
        bounds = np.clip(ends[first : last + 1], position, position + count)
        shifts = np.repeat(shift[first : last + 1], np.diff(bounds, prepend=position))
        return np.arange(position, position + count) + shifts


class BestFitBatches(PackedBatches):
    """Endless batches whose rows each begin with a document, packed by best fit in blocks of 1,024 documents.

    Documents and rows are shuffled each epoch. The cursor counts the rows of an epoch.
    """

    def __init__(self, cache: TokenCache, *, sequence_len: int, rows: int, **kind: Any) -> None:
        """Start like `PackedBatches`, with the same arguments.

        Raises:
            DataError: The text is too short to fill a row.
        """
        super().__init__(cache, sequence_len=sequence_len, rows=rows, **kind)
        self._rows: dict[int, list[list[tuple[int, int]]]] = {}
        self.waste = 1 - len(self._list_rows(self._epoch)) * (sequence_len + 1) / cache.tokens

    def __next__(self) -> Batch:
        """Return ids and targets, int64 (R, T)."""
        epoch, position = self._carry(self._epoch, self._position + self.first)
        parts = []
        for _ in range(self.rank_rows):
            pieces = self._list_rows(epoch)[position]
            parts.append(np.concatenate([self.cache.ids[a : a + n] for a, n in pieces]))
            epoch, position = self._carry(epoch, position + 1)
        self._epoch, self._position = self._carry(self._epoch, self._position + self.rows)
        self._rows = {e: rows for e, rows in self._rows.items() if e >= self._epoch}
        tokens = np.stack(parts).astype(np.int64)  # (R, T + 1)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())

    def _carry(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the epoch and row of a position that may lie beyond the end of `epoch`."""
        while position >= len(self._list_rows(epoch)):
            position -= len(self._list_rows(epoch))
            epoch += 1
        return epoch, position

    def _list_rows(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the rows of an epoch, each a list of pieces (index in the cache, number of tokens)."""
        if epoch not in self._rows:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.cache.documents)
            begins = self.cache.offsets[order]
            lengths = self.cache.offsets[order + 1] - begins
            found: list[list[tuple[int, int]]] = []
            for first in range(0, len(order), BLOCK_DOCUMENTS):
                block = lengths[first : first + BLOCK_DOCUMENTS].tolist()
                for row in pack_best_fit(block, self.sequence_len + 1):
                    found.append([(int(begins[first + i]), taken) for i, taken in row])
            if not found:
                raise DataError(
                    f"this text of {self.cache.tokens:,} tokens fills no row of {self.sequence_len + 1:,}; "
                    "lower model.sequence_len, or set rows to stream."
                )
            shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(len(found))
            self._rows[epoch] = [found[i] for i in shuffled]
        return self._rows[epoch]


class PaddedBatches(PackedBatches):
    """Endless batches with one conversation per row, or T tokens of a longer one.

    Rows are padded with <|bos|>, which is never a target. The cursor counts the rows of an epoch.
    """

    def __init__(self, cache: TokenCache, *, sequence_len: int, rows: int, **kind: Any) -> None:
        """Start like `PackedBatches`, with the same arguments."""
        super().__init__(cache, sequence_len=sequence_len, rows=rows, **kind)
        starts = [
            np.arange(a, max(a + 1, b - 1), sequence_len)
            for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
        ]
        self.starts = np.concatenate(starts)
        self.ends = np.repeat(cache.offsets[1:], [len(s) for s in starts])
        real = np.minimum(self.ends - self.starts - 1, sequence_len).sum()
        self.waste = 1 - float(real) / (len(self.starts) * sequence_len)

    def __next__(self) -> Batch:
        """Return ids and targets, int64 (R, T)."""

        # This rank's rows, in the shuffled order of their epoch.
        total, first = len(self.starts), self._position + self.first
        picked = []
        for place in range(first, first + self.rank_rows):
            epoch, at = self._epoch + place // total, place % total
            if epoch not in self._orders:
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(total)
            picked.append(self._orders[epoch][at])

        # Every rank advances past the rows of all ranks.
        passed, self._position = divmod(self._position + self.rows, total)
        self._epoch += passed
        self._orders = {e: order for e, order in self._orders.items() if e >= self._epoch}

        # Positions beyond a conversation's end become padding.
        where = self.starts[picked][:, None] + np.arange(self.sequence_len + 1)  # (R, T + 1)
        inside = where < self.ends[picked][:, None]
        tokens = self.cache.ids[np.minimum(where, self.cache.tokens - 1)].astype(np.int64)
        learned = (
            inside
            if self.cache.mask is None
            else inside & (self.cache.mask[np.minimum(where, self.cache.tokens - 1)] != 0)
        )
        ids = np.where(inside, tokens, self.cache.bos_id)[:, :-1]
        targets = np.where(learned, tokens, -1)[:, 1:]
        return torch.from_numpy(ids.copy()), torch.from_numpy(targets.copy())


def split_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first row of a rank and its number of rows; ranks differ by at most one row.

    >>> [split_rows(8, rank, 3) for rank in range(3)]
    [(0, 2), (2, 3), (5, 3)]
    """
    if rows < world_size:
        raise ConfigError(
            f"rows={rows} of a step are fewer than world_size={world_size} ranks; set batch_tokens higher."
        )
    first = rank * rows // world_size
    return first, (rank + 1) * rows // world_size - first


def validation_windows(
    cache: TokenCache,
    window: int,
    stride: int = 0,
    *,
    rows: int = 16,
    max_tokens: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield windows over the documents in which every token except the first is a target exactly once.

    The order is fixed and spread over the split, so that a prefix of it resembles the whole and a longer
    prefix contains the shorter ones. It depends only on the number of windows.

    Args:
        cache: Token cache of the split.
        window: Tokens per window, W.
        stride: Tokens between windows; 0 means W. A smaller stride scores only the last tokens of a window.
        rows: Maximum number of windows per batch, R.
        max_tokens: Targets to score, rounded up to whole windows; 0 means all.
        rank: Index of this process, which yields every `world_size`-th batch.
        world_size: Number of processes.

    Yields:
        ids and targets, int64 (R, W); a target of -1 is not scored, ids beyond the end are <|bos|>.
    """
    stride = stride or window
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride={stride} must be from 1 to window={window}; try {max(1, window // 2)}."
        )

    # How many windows there are, and how many of them to score.
    last = cache.tokens - 1  # index of the last target
    count = 1 + max(0, -(-(last - window) // stride)) if last else 0
    some = min(count, -(-max_tokens // stride)) if max_tokens else count

    jump = choose_jump(count)
    for first in range(rank * rows, some, world_size * rows):
        block = np.arange(first, min(some, first + rows)) * jump % count
        where = block[:, None] * stride + np.arange(window + 1)  # (R, W + 1)
        tokens = cache.ids[np.minimum(where, last)].astype(np.int64)

        # The first window scores all of its tokens, the others their last `stride`.
        scored = (where[:, 1:] <= last) & (
            (block == 0)[:, None] | (np.arange(window) >= window - stride)
        )
        if cache.mask is not None:
            scored &= cache.mask[np.minimum(where[:, 1:], last)] != 0
        ids = np.where(where[:, :-1] <= last, tokens[:, :-1], cache.bos_id)
        yield torch.from_numpy(ids), torch.from_numpy(np.where(scored, tokens[:, 1:], -1))


def choose_jump(count: int) -> int:
    """Return the jump j between consecutive windows: the golden section of `count`, lowered until coprime.

    The positions 0, j, 2j, ... modulo `count` visit every window once because j and `count` are coprime. In
    any prefix of them the gaps have at most three sizes, the largest 2.6 times the smallest.
    Source: Swierczkowski 1958, On successive settings of an arc on the circumference of a circle.

    >>> [i * choose_jump(13) % 13 for i in range(13)]
    [0, 8, 3, 11, 6, 1, 9, 4, 12, 7, 2, 10, 5]
    """
    jump = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(jump, count) > 1:
        jump -= 1
    return jump


# Batches from parquet shards


class ShardBatches(Iterator[Batch]):
    """Endless batches from parquet shards, tokenised while they are read as one stream.

    Every rank tokenises the whole stream and keeps its own rows, so the order is the same on any number of
    ranks. This is affordable: a thread tokenises about 15 MB of text per second, and 8 H200 training a d20
    consume 5. With best fit, a row group is packed into whole rows and the cursor's document is such a row.
    """

    waste = 0.0

    def __init__(
        self,
        feed: ShardFeed,
        tokenizer: Tokenizer,
        *,
        sequence_len: int,
        rows: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
        skip_bad: bool = False,
        on_event: OnEvent | None = None,
        threads: int = 4,
        best_fit: bool = False,
    ) -> None:
        """Start at the first shard, or at a cursor.

        Args:
            feed: Parquet files with a column `text`, the same on every rank.
            sequence_len: Tokens per row, T.
            rows: Rows per optimizer step over all ranks; this rank yields its even share, R.
            cursor: Earlier value of `cursor`, from any rank and any number of ranks.
            skip_bad: Report a shard that cannot be read and continue with the next one.
            best_fit: Begin each row with a document, instead of cutting rows from one stream.

        Raises:
            ConfigError: There are fewer rows than ranks.
            DataError: The cursor is outside these shards, or the first shard cannot be read.
        """
        self.first, self.rank_rows = split_rows(rows, rank, world_size)
        self.sequence_len, self.rows = sequence_len, rows
        self.best_fit = best_fit
        # A row of the stream shares its last token with the next one; packed rows share none.
        self.stride = sequence_len + best_fit
        start = {**dict(epoch=0, shard=0, row_group=0, document=0, offset=0), **(cursor or {})}
        if not 0 <= start["shard"] < len(feed):
            raise DataError(
                f"cursor={cursor!r:.120} is no place in {len(feed)} shards; bring back the others."
            )
        feed.begin(start["shard"])
        self._feed, self._stop = feed, threading.Event()
        emit = on_event or (lambda event: None)
        groups = read_groups(feed, tokenizer, threads, start, self._stop, skip_bad, emit)
        self._source = pack_groups(groups, self.stride) if best_fit else groups
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(
            1, thread_name_prefix="primechat-shards"
        )
        self._ahead: deque[Future[Group]] = deque()
        self._groups: deque[Group] = deque()

        self._used = 0  # tokens of the first group that are consumed
        self._fill(1)
        group = self._groups[0]
        wanted, found = (start["shard"], start["row_group"]), (group.shard, group.row_group)
        if cursor and (wanted != found or not 0 <= start["document"] < len(group.offsets) - 1):
            self.close()
            raise DataError(
                f"cursor={cursor!r:.120} finds shard and row group {found}; restore the shards."
            )
        self._used = int(group.offsets[start["document"]]) + start["offset"] if cursor else 0

    @property
    def cursor(self) -> Cursor:
        """Position of the next token, JSON-ready and equal on every rank."""
        group = self._groups[0]
        document = int(np.searchsorted(group.offsets, self._used, side="right")) - 1
        return {
            "epoch": group.epoch,
            "shard": group.shard,
            "row_group": group.row_group,
            "document": document,
            "offset": self._used - int(group.offsets[document]),
        }

    def release(self) -> None:
        """Release the shards before the cursor; call it once a checkpoint holds the cursor."""
        self._feed.release(self._groups[0].shard)

    def __next__(self) -> Batch:
        """Return ids and targets, int64 (R, T)."""
        stride = self.stride
        self._fill(self.rows * stride + 1)

        # This rank's tokens, which may span row groups.
        parts, skip = [], self._used + self.first * stride
        need = self.rank_rows * stride + (not self.best_fit)
        for group in self._groups:
            parts.append(group.ids[skip : skip + need])
            skip, need = max(0, skip - len(group.ids)), need - len(parts[-1])
            if not need:
                break
        tokens = np.concatenate(parts)

        # Every rank advances past the rows of all ranks.
        self._used += self.rows * stride
        while self._used >= len(self._groups[0].ids):
            self._used -= len(self._groups.popleft().ids)

        shape = (self.rank_rows, stride)
        if self.best_fit:
            whole = torch.from_numpy(tokens.reshape(shape))
            return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
        targets = torch.from_numpy(tokens[1:].reshape(shape).copy())
        return torch.from_numpy(tokens[:-1].reshape(shape)), targets

    def _fill(self, need: int) -> None:
        """Read row groups until at least `need` unused tokens are in memory."""
        have = sum(len(group.ids) for group in self._groups) - (self._used if self._groups else 0)
        while have < need:
            if self._pool is None:
                raise DataError("these batches are closed; open them again.")
            while len(self._ahead) < GROUPS_AHEAD:
                self._ahead.append(self._pool.submit(next, self._source))
            try:
                group = self._ahead.popleft().result()
            except BaseException:
                self.close()
                raise
            self._groups.append(group)
            have += len(group.ids)

    def close(self) -> None:
        """Stop the reading thread."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

"""Byte-pair merges one at a time: learning them, and replaying how the tokens of a text arise.

Learning merges the most frequent pair and breaks ties by the smaller ids, like rustbpe. Replaying merges the
pair whose joined bytes have the lowest rank and breaks ties by the leftmost, like tiktoken. This is plain
Python, made for inspection; use `Tokenizer.train` to train a tokenizer.
Reference: Sennrich, Haddow & Birch 2016, Neural Machine Translation of Rare Words with Subword Units, 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nlargest
from itertools import accumulate, pairwise
from typing import Protocol

from primechat.text.pieces import split_pieces


class Vocabulary(Protocol):
    """The attributes of a tokenizer that a replay needs."""

    @property
    def pattern(self) -> str: ...

    @property
    def ranks(self) -> dict[bytes, int]: ...


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A learned merge: the ids of the pair, the bytes of the new token and the pair's count."""

    left: int
    right: int
    token: bytes
    count: int


class PairLearner:
    """Learner of merges from texts, one merge per call of `learn`.

    >>> learner = PairLearner(["low lower lowest"])
    >>> [learner.learn().token for _ in range(3)]
    [b'lo', b'low', b' low']
    """

    def __init__(self, texts: Iterable[str]) -> None:
        pieces = Counter(piece for text in texts for piece in split_pieces(text))
        self.tokens = [bytes([i]) for i in range(256)]
        self._words = [list(piece.encode()) for piece in pieces]
        self._times = [*pieces.values()]
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._where: dict[tuple[int, int], set[int]] = {}
        for i in range(len(self._words)):
            self._count(i, 1)
        self._heap = [(-count, pair) for pair, count in self._pairs.items()]
        heapify(self._heap)
        self.n_bytes = self.n_tokens = sum(
            len(word) * times for word, times in zip(self._words, self._times, strict=True)
        )

    @property
    def ranks(self) -> dict[bytes, int]:
        """The current vocabulary: the id of each token, by its bytes."""
        return {token: i for i, token in enumerate(self.tokens)}

    def learn(self) -> Merge | None:
        """Merge the most frequent pair everywhere and return the merge, or None if no pair is left."""
        while self._heap:
            count, pair = heappop(self._heap)
            now = self._pairs[pair]
            if now == -count:
                return self._merge(pair, now)
            if now:  # the count has dropped since the entry was pushed
                heappush(self._heap, (-now, pair))
        return None

    def list_pairs(self, limit: int) -> list[tuple[int, int, int]]:
        """Return the currently most frequent pairs as (left id, right id, count), the next merge first."""
        top = nlargest(limit, ((count, -a, -b) for (a, b), count in self._pairs.items() if count))
        return [(-a, -b, count) for count, a, b in top]

    def _merge(self, pair: tuple[int, int], count: int) -> Merge:
        new = len(self.tokens)
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])

        # Recount the pairs of each word that contains the merged pair.
        fresh: set[tuple[int, int]] = set()
        for i in self._where.pop(pair):
            word = self._words[i]
            self._count(i, -1)
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = [new]
                    self.n_tokens -= self._times[i]
                at += 1
            self._count(i, 1)
            fresh.update(both for both in pairwise(word) if new in both)

        # Only pairs with the new token can have gained; the others are corrected when they are popped.
        for both in fresh:
            heappush(self._heap, (-self._pairs[both], both))
        return Merge(left=pair[0], right=pair[1], token=self.tokens[new], count=count)

    def _count(self, i: int, sign: int) -> None:
        times = sign * self._times[i]
        for pair in pairwise(self._words[i]):
            self._pairs[pair] += times
            if sign > 0:
                self._where.setdefault(pair, set()).add(i)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a replay: the rank of the merge, its first pair, and the number of places merged."""

    rank: int
    left: bytes
    right: bytes
    places: int


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The steps by which the tokens of a text arise from its bytes.

    `removed_at[i]` is the step that removes the boundary before byte i, or -1 if it remains; `pieces` holds
    the offsets at which the split pattern cuts, which no merge crosses.
    """

    data: bytes
    pieces: tuple[int, ...]
    removed_at: tuple[int, ...]
    steps: tuple[Step, ...]

    def tokens_after(self, n_steps: int) -> list[bytes]:
        """Return the bytes of each token after `n_steps` steps."""
        starts = [i for i, step in enumerate(self.removed_at) if not 0 <= step < n_steps]
        return [self.data[a:b] for a, b in pairwise([*starts, len(self.data)])]


def replay_merges(vocabulary: Vocabulary, text: str) -> Replay:
    """Return the merges that `encode` makes in a text, ordered by rank over the whole text.

    Merges never cross pieces, so this order yields the same tokens as `encode`, which goes piece by piece.
    """
    # The merges of each piece on its own.
    pieces = [piece.encode() for piece in split_pieces(text, vocabulary.pattern)]
    offsets = [0, *accumulate(map(len, pieces))]
    known = {piece: [*merge_piece(piece, vocabulary.ranks)] for piece in set(pieces)}

    # Take the lowest rank in any piece and make all of its merges in one step.
    queue = [(known[piece][0][0], i, 0) for i, piece in enumerate(pieces) if known[piece]]
    heapify(queue)
    removed_at = [-1] * offsets[-1]
    steps: list[Step] = []
    while queue:
        rank, first, places = queue[0][0], queue[0][1:], 0
        while queue and queue[0][0] == rank:
            _, i, at = heappop(queue)
            moves = known[pieces[i]]
            while at < len(moves) and moves[at][0] == rank:
                removed_at[offsets[i] + moves[at][2]] = len(steps)
                at, places = at + 1, places + 1
            if at < len(moves):
                heappush(queue, (moves[at][0], i, at))

        # The step shows the pair at its first place.
        piece = pieces[first[0]]
        _, start, middle, end = known[piece][first[1]]
        steps.append(
            Step(rank=rank, left=piece[start:middle], right=piece[middle:end], places=places)
        )
    data = b"".join(pieces)
    return Replay(
        data=data, pieces=tuple(offsets[:-1]), removed_at=tuple(removed_at), steps=tuple(steps)
    )


def merge_piece(piece: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the merges within one piece in the order of `encode`, as (rank, start, middle, end)."""
    # The parts form a linked list: end_of[i] is the end of the part that starts at i, -1 if none does;
    # start_of[i] is the start of the part before it.
    end_of = [*range(1, len(piece) + 1)]
    start_of = [*range(-1, len(piece) - 1)]
    queue: list[tuple[int, int, int, int]] = []

    def file(start: int) -> None:
        if start >= 0 and end_of[start] < len(piece):
            middle = end_of[start]
            rank = ranks.get(piece[start : end_of[middle]])
            if rank is not None:
                heappush(queue, (rank, start, middle, end_of[middle]))

    # Merge the pair of the lowest rank, again and again; an entry whose parts have changed is stale.
    for start in range(len(piece)):
        file(start)
    while queue:
        rank, start, middle, end = heappop(queue)
        if end_of[start] != middle or end_of[middle] != end:
            continue
        yield rank, start, middle, end
        end_of[start], end_of[middle] = end, -1
        if end < len(piece):
            start_of[end] = start
        file(start)
        file(start_of[start])

    # tiktoken looks up the whole piece first, so a piece that is a token becomes that token in any case.
    if piece and end_of[0] < len(piece) and piece in ranks:
        middle = end_of[0]
        while middle < len(piece):
            yield ranks[piece], 0, middle, end_of[middle]
            middle = end_of[middle]

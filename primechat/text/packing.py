"""Rows that each begin with a document: best fit, with one document cut at the end of a row.

A block of documents is packed on its own, so that a place in the text is a block and a row of it, and a run
resumes there exactly. nanochat refills a buffer of 1,000 documents instead, and its runs resume nearby.
Reference: nanochat HEAD, dataloader.py; Ding et al. 2024, Fewer Truncations Improve Language Modeling.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from primechat.errors import DataError
from primechat.text.tokens import Group

BLOCK_DOCUMENTS = 1024  # documents packed together: a row group of the shards
KEPT_SHARE = (
    0.65  # of the tokens of web pages at rows of 2,048, by nanochat's count; the rest is cut off
)

Row = list[tuple[int, int]]  # documents of a row and how many of their first tokens it takes


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Return full rows: each takes the longest document that fits, again and again, and when none fits the
    beginning of the shortest one, whose rest is dropped. What fills no whole row at the end is dropped too.

    Args:
        lengths: tokens of each document, <|bos|> included.
        capacity: tokens of a row.

    >>> pack_best_fit([3, 5, 2, 9], 8)
    [[(1, 5), (0, 3)], [(2, 2), (3, 6)]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[document] for document in order]
    rows: list[Row] = []
    row: Row = []
    room = capacity
    while order:
        place = max(0, bisect_right(sizes, room) - 1)  # the longest that fits, else the shortest
        document, taken = order.pop(place), min(sizes.pop(place), room)
        row.append((document, taken))
        room -= taken
        if not room:
            rows.append(row)
            row, room = [], capacity
    return rows


def lay_rows(group: Group, capacity: int) -> Group:
    """Return a row group packed: its tokens are whole rows, shuffled, and its offsets theirs.

    As they come, best fit's rows go from few long documents to many short ones.
    """
    starts = group.offsets[:-1]
    rows = pack_best_fit(np.diff(group.offsets).tolist(), capacity)
    order = np.random.default_rng([group.epoch, group.shard, group.row_group]).permutation(
        len(rows)
    )
    parts = [
        group.ids[starts[document] : starts[document] + taken]
        for i in order
        for document, taken in rows[i]
    ]
    ids = np.concatenate(parts) if parts else group.ids[:0]
    return Group(
        group.epoch,
        group.shard,
        group.row_group,
        ids,
        np.arange(0, len(ids) + 1, capacity),
    )


def pack_groups(groups: Iterable[Group], capacity: int) -> Iterator[Group]:
    """Yield row groups packed, those without a whole row left out.

    Raises:
        DataError: a whole epoch has no row.
    """
    full = None  # the last epoch that had a row
    for group in groups:
        packed = lay_rows(group, capacity)
        if len(packed.ids):
            full = group.epoch
            yield packed
        elif full is None:
            full = group.epoch
        elif group.epoch > full + 1:
            raise DataError(
                f"no shard fills a row of {capacity:,} tokens; lower model.sequence_len, or set rows to "
                "stream."
            )

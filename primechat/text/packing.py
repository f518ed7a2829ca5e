"""Best-fit packing: rows that each begin with a document, with at most one document cut at the end of a row.

Each block of documents is packed on its own, so that a position in the text is a block and a row in it, and a
run resumes exactly there. nanochat refills a buffer of 1,000 documents instead and resumes approximately.
Reference: nanochat HEAD, dataloader.py; Ding et al. 2024, Fewer Truncations Improve Language Modeling.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from primechat.errors import DataError
from primechat.text.tokens import Group

BLOCK_DOCUMENTS = 1024  # documents packed together, as many as a row group of the shards has
# Share of tokens that are kept of web pages with rows of 2,048, by nanochat's count; the rest is cut off.
KEPT_SHARE = 0.65

Row = list[tuple[int, int]]  # (document, number of its first tokens) for each document in a row


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Return full rows of documents, packed by best fit.

    A row repeatedly takes the longest document that fits; when none fits, it takes the beginning of the
    shortest one and drops the rest of it. Documents that do not fill a last row are dropped too.

    Args:
        lengths: Tokens of each document, including <|bos|>.
        capacity: Tokens per row.

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
    """Return a packed row group: its tokens are whole rows in shuffled order, its offsets those of the rows.

    Rows are shuffled because best fit packs the long documents first and the short ones last.
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
    """Yield packed row groups, omitting those that do not fill a row.

    Raises:
        DataError: No row group of a whole epoch fills a row.
    """
    full = None  # last epoch with a row; at the start, the first epoch
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

"""Best fit: rows that begin with a document, the same on any number of ranks, and resumed at the next one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from primechat.errors import DataError
from primechat.text.batches import BestFitBatches, ShardBatches
from primechat.text.packing import pack_best_fit
from primechat.text.shards import ShardFeed
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from primechat.text.tokens import TokenCache

BYTES = Tokenizer(
    SPLIT_PATTERN,
    {bytes([i]): i for i in range(256)},
    {n: 256 + i for i, n in enumerate(SPECIAL_TOKENS)},
)
BOS = BYTES.bos_id


def pack_plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    """nanochat's rule, by looking at every document each time; the tokens that a row takes of each."""
    left, rows, row = list(lengths), [], []
    while left:
        room = capacity - sum(row)
        fitting = [n for n in left if n <= room]
        chosen = max(fitting) if fitting else min(left)
        left.remove(chosen)
        row.append(min(chosen, room))
        if sum(row) == capacity:
            rows.append(row)
            row = []
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_is_nanochats_rule(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice((1, 2, 5, 9, 30)) + draw.randint(0, 4) for _ in range(60)]
    rows = pack_best_fit(lengths, 17)
    assert [[taken for _, taken in row] for row in rows] == pack_plainly(lengths, 17)
    used = [document for row in rows for document, _ in row]
    assert len(set(used)) == len(used) and len(rows) > 10
    for row in rows:
        whole = [taken == lengths[document] for document, taken in row]
        assert all(whole[:-1]), "only the last document of a row is cut"


def make_cache(lengths: list[int]) -> TokenCache:
    """Documents of <|bos|> and then numbers that tell document and place."""
    parts = [
        np.array([BOS, *(1000 * (i + 1) + np.arange(1, n))], np.uint32)
        for i, n in enumerate(lengths)
    ]
    return TokenCache(np.concatenate(parts), np.cumsum([0, *lengths]), None, BOS)


def read(cache: TokenCache, world: int, steps: int, cursor: Any = None) -> tuple[Any, list[Any]]:
    ranks = [
        BestFitBatches(cache, sequence_len=16, rows=6, rank=r, world_size=world, cursor=cursor)
        for r in range(world)
    ]
    rows, cursors = [], []
    for _ in range(steps):
        batches = [next(rank) for rank in ranks]
        rows += [np.c_[i, t[:, -1:]] for i, t in batches]
        assert all((i[:, 1:] == t[:, :-1]).all() for i, t in batches), "shifted by one"
        cursors.append(json.loads(json.dumps(ranks[0].cursor)))
        assert all(rank.cursor == cursors[-1] for rank in ranks)
    return np.concatenate(rows), cursors


def test_rows_of_a_cache() -> None:
    """Each begins with a document; through epochs, ranks and a resume the rows are the same."""
    draw = random.Random(3)
    cache = make_cache([draw.choice((2, 4, 7, 11, 40)) for _ in range(80)])
    rows, cursors = read(cache, 1, 20)
    assert cursors[-1]["epoch"] >= 1, "more than one epoch was read"
    assert (rows[:, 0] == BOS).all() and rows.shape == (120, 17)
    for row in rows:
        for before, after in zip(row, row[1:], strict=False):
            assert after == BOS or before == BOS or after == before + 1, "documents stay in order"
            assert before != BOS or after == BOS or after % 1000 == 1, (
                "and begin at their beginning"
            )
    for world in (2, 3):
        assert (read(cache, world, 20)[0] == rows).all()
    for k in (0, 7, 13):
        rest, later = read(cache, 2, 19 - k, cursors[k])
        assert (rest == rows[6 * (k + 1) :]).all() and later == cursors[k + 1 :]
    first = len(BestFitBatches(cache, sequence_len=16, rows=6)._list_rows(0))
    assert len({row.tobytes() for row in rows[:first]}) == first, "no row twice in an epoch"
    batches = BestFitBatches(cache, sequence_len=16, rows=6)
    assert batches.waste == pytest.approx(1 - 17 * first / cache.tokens) and 0 < batches.waste < 1


def test_text_without_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="fills no row of 17; lower model.sequence_len"):
        BestFitBatches(make_cache([5, 6]), sequence_len=16, rows=6)


def read_shards(paths: list[Path], world: int, steps: int, cursor: Any = None) -> Any:
    feed = ShardFeed([path.name for path in paths], paths[0].parent)
    ranks = [
        ShardBatches(
            feed,
            BYTES,
            sequence_len=16,
            rows=6,
            rank=r,
            world_size=world,
            cursor=cursor,
            best_fit=True,
        )
        for r in range(world)
    ]
    rows, cursors = [], []
    for _ in range(steps):
        rows += [np.c_[i, t[:, -1:]] for i, t in (next(rank) for rank in ranks)]
        cursors.append(json.loads(json.dumps(ranks[0].cursor)))
    for rank in ranks:
        rank.close()
    return np.concatenate(rows), cursors


def test_rows_of_shards(tmp_path: Path) -> None:
    """The same of parquet shards, row groups too small for a row included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw, paths = random.Random(0), []
    for shard in range(3):
        texts = [
            "".join(draw.choice("abcdef") for _ in range(draw.choice((0, 3, 8, 20, 50))))
            for _ in range(30)
        ]
        paths.append(tmp_path / f"{shard}.parquet")
        table = pa.table({"text": pa.array(["ab", *texts], pa.string())})
        pq.write_table(table, paths[-1], row_group_size=12 if shard else 1)
    rows, cursors = read_shards(paths, 1, 30)
    assert (rows[:, 0] == BOS).all() and rows.shape == (180, 17)
    assert cursors[-1]["epoch"] >= 1
    assert (read_shards(paths, 3, 30)[0] == rows).all()
    for k in (0, 11, 24):
        rest, later = read_shards(paths, 2, 29 - k, cursors[k])
        assert (rest == rows[6 * (k + 1) :]).all() and later == cursors[k + 1 :]
    few = tmp_path / "few.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), few)
    with pytest.raises(DataError, match="no shard fills a row of 17 tokens"):
        read_shards([few], 1, 1)

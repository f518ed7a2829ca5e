"""Batches: every token a target once an epoch, for any number of ranks, and resumed at the next one."""

import gc
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from primechat.errors import ConfigError, DataError
from primechat.text.batches import (
    PackedBatches,
    PaddedBatches,
    ShardBatches,
    TokenCache,
    build_cache,
    validation_windows,
)
from primechat.text.shards import ShardFeed
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

BYTES = Tokenizer(
    SPLIT_PATTERN,
    {bytes([i]): i for i in range(256)},
    {n: 256 + i for i, n in enumerate(SPECIAL_TOKENS)},
)


def make_cache(lengths: list[int], *, masked: bool = False) -> TokenCache:
    """Documents whose tokens all differ, so that each place of the stream can be told."""
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1], dtype=np.uint32)
    return TokenCache(ids, offsets, (ids % 3 > 0).astype(np.uint8) if masked else None, 999)


def read_ranks(
    cache: TokenCache, world: int, steps: int, cursor: Any = None, **kwargs: Any
) -> tuple[list, list, list]:
    """The ids and targets of all ranks, in the order of the stream, and the cursor after each step."""
    ranks = [
        PackedBatches(cache, rank=r, world_size=world, cursor=cursor, **kwargs)
        for r in range(world)
    ]
    ids, targets, cursors = [], [], []
    for _ in range(steps):
        batches = [next(rank) for rank in ranks]
        ids += [i.flatten().tolist() for i, _ in batches]
        targets += [t.flatten().tolist() for _, t in batches]
        assert len({json.dumps(rank.cursor) for rank in ranks}) == 1
        cursors.append(json.loads(json.dumps(ranks[0].cursor)))
    return sum(ids, []), sum(targets, []), cursors


@pytest.mark.parametrize("seed", range(6))
def test_every_token_once_an_epoch(seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache([rng.choice((1, 2, 5, 40)) for _ in range(rng.randint(1, 30))])
    size = dict(sequence_len=rng.randint(1, 9), rows=6, seed=seed)
    steps = 3 * cache.tokens // (6 * size["sequence_len"]) + 2
    ids, targets, cursors = read_ranks(cache, 1, steps, **size)
    T = size["sequence_len"]
    begins, n_rows = (
        set(cache.offsets[:-1].tolist()),
        -(-3 * cache.tokens // T),
    )  # that begin in 3 epochs
    for at in range(0, n_rows * T, T):
        row, goal = ids[at : at + T], targets[at : at + T]
        assert row[1:] == goal[:-1], "targets are the row shifted by one"
        for before, after in zip(row, goal, strict=True):
            assert after == before + 1 or after in begins, "documents stay whole"
    for part, lacking in ((ids, 0), (targets, 1)):  # the very first token of all is never a target
        counts = Counter(part[: n_rows * T])
        assert sum(max(0, 3 - counts[i]) for i in range(cache.tokens)) <= lacking, (
            "each token once an epoch"
        )
        assert sum(counts.values()) - 3 * cache.tokens < T, (
            "and no more than the last row's rest again"
        )
    for world in (2, 3):
        assert read_ranks(cache, world, steps, **size) == (ids, targets, cursors)
    for k in rng.sample(range(steps - 1), min(4, steps - 1)):
        for world in (1, 3):
            rest = read_ranks(cache, world, steps - k - 1, cursors[k], **size)
            done = (k + 1) * 6 * size["sequence_len"]
            assert rest == (ids[done:], targets[done:], cursors[k + 1 :])


def test_order_depends_on_seed_and_epoch() -> None:
    cache = make_cache([7] * 50)
    kwargs = dict(sequence_len=7, rows=50)
    first, _, _ = read_ranks(cache, 1, 2, seed=0, **kwargs)
    other, _, _ = read_ranks(cache, 1, 1, seed=1, **kwargs)
    assert len({tuple(first[:350]), tuple(first[350:]), tuple(other), tuple(range(350))}) == 4


def test_a_long_document_is_spread_over_the_epoch() -> None:
    cache = make_cache([10] * 90 + [900])
    batches = PackedBatches(cache, sequence_len=10, rows=18)
    shares = [int((next(batches)[0] >= 900).sum()) / 180 for _ in range(10)]
    assert max(shares) < 0.8 and min(shares) > 0.2, shares


def test_mask_hides_targets() -> None:
    cache = make_cache([10, 20, 30], masked=True)
    ids, targets, _ = read_ranks(cache, 1, 3, sequence_len=5, rows=4)
    assert [t for i, t in enumerate(targets) if (i + 1) % 5] == [
        token if token % 3 else -1 for i, token in enumerate(ids) if i % 5
    ]


def test_tensors() -> None:
    batches = PackedBatches(make_cache([100]), sequence_len=4, rows=6, rank=1, world_size=3)
    ids, targets = next(batches)
    assert ids.shape == targets.shape == (2, 4) and ids.dtype == targets.dtype == torch.int64
    assert all(
        t == [i + 1 for i in row] for row, t in zip(ids.tolist(), targets.tolist(), strict=True)
    )
    assert batches.cursor == {"epoch": 0, "position": 24} and batches.waste == 0


def test_wrong_settings() -> None:
    cache = make_cache([10])
    with pytest.raises(ConfigError, match="rows=1 of a step are fewer than world_size=2"):
        PackedBatches(cache, sequence_len=4, rows=1, world_size=2)
    for cursor in ({"epoch": 0, "position": 10}, {"epoch": 0}, {"epoch": 0, "position": -1}):
        with pytest.raises(DataError, match="is no place in a stream of 10 tokens"):
            PackedBatches(cache, sequence_len=4, rows=4, cursor=cursor)
    with pytest.raises(ConfigError, match="stride=5 must be from 1 to window=4"):
        next(validation_windows(cache, 4, 5))


# Validation


@pytest.mark.parametrize(
    ("window", "stride", "rows"),
    [(8, 0, 3), (8, 3, 2), (8, 8, 1), (5, 1, 7), (100, 50, 4), (1, 1, 2)],
)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 10, 57])
def test_windows_score_every_target_once(window: int, stride: int, rows: int, tokens: int) -> None:
    cache = make_cache([1] * tokens)
    seen: list[int] = []
    for rank in range(2):
        for ids, targets in validation_windows(
            cache, window, stride, rows=rows, rank=rank, world_size=2
        ):
            assert ids.shape == targets.shape and ids.shape[1] == window and ids.shape[0] <= rows
            for row, goal in zip(ids.tolist(), targets.tolist(), strict=True):
                real = [i for i in row if i != 999]
                assert real == list(range(real[0], real[0] + len(real))) and row[len(real) :] == [
                    999
                ] * (window - len(real))
                assert all(t in (-1, i + 1) for i, t in zip(row, goal, strict=True))
                seen += [t for t in goal if t >= 0]
                assert max(goal) >= 0, "a window that scores nothing costs time"
                context = [i for i, t in enumerate(goal) if t >= 0]
                assert not context or real[0] == 0 or context[0] == window - (stride or window)
    assert Counter(seen) == Counter(range(1, tokens))


def first_tokens(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for ids, _ in batches for row in ids]


def test_parts_are_nested_and_lie_all_over_the_split() -> None:
    """Each larger part begins with the windows of the smaller ones, whatever the batch size."""
    cache = make_cache([8 * 500 + 1])
    whole = first_tokens(validation_windows(cache, 8))
    assert sorted(whole) == list(range(0, 4000, 8)), "each window once"
    for tokens in (8, 40, 400, 2000):
        for rows in (1, 3, 16):
            part = first_tokens(validation_windows(cache, 8, rows=rows, max_tokens=tokens))
            assert part == whole[: tokens // 8]
        ends = [-1, *sorted(part), 4000]
        widest = max(b - a for a, b in itertools.pairwise(ends))
        assert widest <= 2.7 * 4000 / len(part) + 8, "no large gap in it"
    assert len(first_tokens(validation_windows(cache, 8, max_tokens=9999))) == 500


def test_ranks_share_the_batches_of_one() -> None:
    """Each batch is made of the same windows for any number of ranks, so its sums are the same too."""
    cache = make_cache([8 * 100 + 1])
    alone = [first_tokens([batch]) for batch in validation_windows(cache, 8, rows=3)]
    for world in (2, 3):
        shares = [
            [
                first_tokens([batch])
                for batch in validation_windows(cache, 8, rows=3, rank=rank, world_size=world)
            ]
            for rank in range(world)
        ]
        assert [shares[i % world][i // world] for i in range(len(alone))] == alone


# The cache


def test_cache_of_texts(tmp_path: Path) -> None:
    texts = ["hello", "é", "", "a\nb"]
    cache = build_cache(iter(texts), BYTES, tmp_path, "key")
    assert [
        cache.ids[a:b].tolist() for a, b in zip(cache.offsets, cache.offsets[1:], strict=False)
    ] == [[256, *text.encode()] for text in texts]
    assert (cache.tokens, cache.documents, cache.bos_id) == (14, 4, 256)
    assert cache.ids.dtype == np.uint16 and cache.mask is None

    def untouched() -> Any:
        raise AssertionError("a cache that stands must not read the documents again")
        yield ""

    again = build_cache(untouched(), BYTES, tmp_path, "key")
    assert again.ids.tolist() == cache.ids.tolist()
    assert len(list(tmp_path.iterdir())) == 1
    assert build_cache(["other"], BYTES, tmp_path, "key 2").tokens == 6
    other = Tokenizer(
        SPLIT_PATTERN,
        {**BYTES.ranks, b"he": 256},
        {n: 257 + i for i, n in enumerate(SPECIAL_TOKENS)},
    )
    assert build_cache(["hello"], other, tmp_path, "key").tokens == 5


def test_cache_of_conversations(tmp_path: Path) -> None:
    talk = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo!"}]
    }
    cache = build_cache([BYTES.render_conversation(talk)] * 2, BYTES, tmp_path, "key")
    assert cache.mask is not None and cache.mask.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert cache.documents == 2
    _, targets = next(PackedBatches(cache, sequence_len=10, rows=1))
    assert targets.tolist() == [[-1] * 5 + [*b"yo!", BYTES.special("<|assistant_end|>")] + [-1]]


@pytest.mark.parametrize(
    "harm", ["ids.bin", "mask.bin", "offsets.npy", "meta.json", "truncate", "stale", "junk"]
)
def test_torn_cache_is_rebuilt(tmp_path: Path, harm: str) -> None:
    pairs = [([256, 1, 2], [0, 1, 1])] * 5
    build_cache(pairs, BYTES, tmp_path, "key")
    (folder,) = tmp_path.iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    if harm == "truncate":
        (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-2])
    elif harm == "stale":
        (folder / "meta.json").write_text(json.dumps({**meta, "identity": "x"}))
    elif harm == "junk":
        (folder / "meta.json").write_text("[1]")
    else:
        (folder / harm).unlink()
    assert build_cache(pairs, BYTES, tmp_path, "key").tokens == 15
    assert json.loads((folder / "meta.json").read_text()) == meta
    assert list(tmp_path.iterdir()) == [folder]


def test_short_ids_are_noticed(tmp_path: Path) -> None:
    build_cache(["abc"], BYTES, tmp_path, "key")
    (folder,) = tmp_path.iterdir()
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-2])
    assert build_cache(["abc"], BYTES, tmp_path, "key").ids.tolist() == [256, *b"abc"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(
        DataError, match="cannot be written .No space left on device.; free some space"
    ):
        build_cache(["abc"], BYTES, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_goes(tmp_path: Path) -> None:
    """A build that was killed left its folder; one that may still be at work is left alone."""
    for name, days in ((".building-old", 3), (".building-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - days * 86_400,) * 2)
    build_cache(["abc"], BYTES, tmp_path, "key")
    assert [path.name for path in tmp_path.glob(".building-*")] == [".building-new"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Any:
        yield "a"
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        build_cache(fail(), BYTES, tmp_path, "key")
    with pytest.raises(DataError, match="has no documents"):
        build_cache([], BYTES, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


# Shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, paths = random.Random(3), []
    for shard in range(3):
        texts = [
            rng.choice(["", "x", "yz" * 9, None]) if i % 4 else f"{shard}:{i}"
            for i in range(rng.randint(9, 25))
        ]
        paths.append(tmp_path / f"{shard}.parquet")
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.string())}), paths[-1], row_group_size=4
        )
    return paths


def open_shards(paths: list[Path], **kwargs: Any) -> ShardBatches:
    return ShardBatches(make_feed(paths), BYTES, **{"sequence_len": 5, "rows": 2, **kwargs})


def make_feed(paths: list[Path]) -> ShardFeed:
    return ShardFeed([path.name for path in paths], paths[0].parent)


def read_steps(
    paths: list[Path], world: int, steps: int, cursor: Any = None, rows: int = 4, **kwargs: Any
) -> tuple[list[int], list[int], list[dict]]:
    """The ids and targets of all ranks, in the order of the stream, and the cursor after each step."""
    shape: Any = dict(rows=rows, world_size=world, cursor=cursor, **kwargs)
    ranks = [open_shards(paths, rank=rank, **shape) for rank in range(world)]
    ids, targets, cursors = [], [], []
    for _ in range(steps):
        for i, t in [next(rank) for rank in ranks]:
            ids += i.flatten().tolist()
            targets += t.flatten().tolist()
        assert len({json.dumps(rank.cursor) for rank in ranks}) == 1
        cursors.append(json.loads(json.dumps(ranks[0].cursor)))
    for rank in ranks:
        rank.close()
    return ids, targets, cursors


def read_texts(paths: list[Path]) -> list[int]:
    import pyarrow.parquet as pq

    texts = [text for path in paths for text in pq.read_table(path).column(0).to_pylist()]
    return sum(([256, *(text or "").encode()] for text in texts), [])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_are_one_stream(shards: list[Path], world: int) -> None:
    epoch = read_texts(shards)
    steps = 2 * len(epoch) // 20 + 1
    ids, targets, cursors = read_steps(shards, world, steps)
    assert ids == (epoch * 3)[: len(ids)] and targets == (epoch * 3)[1 : len(ids) + 1]
    assert cursors[-1]["epoch"] == 2 and cursors[0]["epoch"] == 0
    for k in range(0, steps - 1, 3):
        rest = read_steps(shards, world, steps - k - 1, cursors[k])
        assert rest == (ids[20 * k + 20 :], targets[20 * k + 20 :], cursors[k + 1 :])


def test_every_document_once_through_kills(shards: list[Path]) -> None:
    """Runs that are killed, lose what they did since their checkpoint, and come back on other ranks."""
    chance, epoch = random.Random(5), read_texts(shards)
    kept: list[int] = []
    cursor = None
    while len(kept) < 2 * len(epoch):
        world, steps = chance.choice([1, 2, 3, 4]), chance.randint(1, 6)
        ids, _, cursors = read_steps(shards, world, steps, cursor, rows=chance.choice([4, 6]))
        saved = chance.randint(0, steps)  # the steps before the last checkpoint
        if saved:
            kept += ids[: len(ids) // steps * saved]
            cursor = cursors[saved - 1]

    def list_documents(tokens: list[int]) -> Counter[tuple[int, ...]]:
        cuts = [i for i, token in enumerate(tokens) if token == 256] + [len(tokens)]
        return Counter(tuple(tokens[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))

    assert list_documents(kept[: 2 * len(epoch)]) == list_documents(epoch * 2)


def shard_threads() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if thread.name.startswith("primechat-shards")
    ]


def test_thread_ends(shards: list[Path]) -> None:
    batches = open_shards(shards)
    next(batches)
    (thread,) = shard_threads()
    del batches
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    batches = open_shards(shards)
    batches.close()
    assert shard_threads() == []
    with pytest.raises(DataError, match="are closed"):
        for _ in range(1000):
            next(batches)


def test_shard_errors(shards: list[Path]) -> None:
    cursor = {"epoch": 0, "shard": 0, "row_group": 0, "document": 0, "offset": 0}
    for change in ({"shard": 9}, {"row_group": 99}, {"document": 99}):
        with pytest.raises(DataError, match="cursor="):
            open_shards(shards, cursor={**cursor, **change})
    with pytest.raises(ConfigError, match="rows=2 of a step are fewer than world_size=3"):
        open_shards(shards, rank=0, world_size=3)

    class Failing(Tokenizer):
        def encode_batch(self, texts: Any, threads: int = 0) -> list[list[int]]:
            if "2:0" in texts:
                raise DataError("the tokenizer broke")
            return super().encode_batch(texts, threads)

    broken = Failing(BYTES.pattern, BYTES.ranks, BYTES.specials)
    batches = ShardBatches(make_feed(shards), broken, sequence_len=5, rows=2)
    with pytest.raises(DataError, match="the tokenizer broke"):
        for _ in range(1000):
            next(batches)
    assert all(not thread.join(10) and not thread.is_alive() for thread in shard_threads())


@pytest.mark.parametrize("harm", ["torn", "text", "column"])
def test_bad_shard(shards: list[Path], harm: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = read_texts([shards[0], shards[2]])
    if harm == "column":
        pq.write_table(pa.table({"words": ["a"]}), shards[1])
    else:
        data = shards[1].read_bytes()
        shards[1].write_bytes(data[: len(data) // 2] if harm == "torn" else b"no parquet at all")
    with pytest.raises(DataError, match=r"1.parquet (is damaged|has no column).*--skip_bad_shards"):
        read_steps(shards, 1, 60)
    told: list[Any] = []
    ids, _, cursors = read_steps(
        shards, 1, len(good) // 20 + 1, skip_bad=True, on_event=told.append
    )
    assert ids == (good * 2)[: len(ids)], "what stands in the others is read, in order"
    assert "Skipped a shard" in told[0].text and "1.parquet" in told[0].text
    assert read_steps(shards, 1, 1, cursors[-2], skip_bad=True)[0] == ids[-20:]
    for path in shards:
        path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="none of the 3 shards can be read"):
        open_shards(shards, skip_bad=True)


def test_damage_inside_a_shard(shards: list[Path]) -> None:
    """A row group that does not unpack, found while reading: the rest of its shard is left out."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(shards[0]) as file:
        column = file.metadata.row_group(1).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(shards[0].read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    whole = read_texts(shards[1:])
    shards[0].write_bytes(data)
    with pytest.raises(DataError, match="0.parquet row group 1 cannot be read"):
        read_steps(shards, 1, 60)
    ids, _, _ = read_steps(shards, 2, 30, skip_bad=True)
    assert "".join(map(chr, whole[:80])) in "".join(map(chr, ids))


def test_missing_shard_is_waited_for(shards: list[Path]) -> None:
    aside, whole = shards[1].with_suffix(".aside"), read_texts(shards)
    shards[1].rename(aside)
    batches, got = open_shards(shards), []
    timer = threading.Timer(0.5, lambda: aside.rename(shards[1]))
    timer.start()
    while len(got) < len(whole):
        got += next(batches)[0].flatten().tolist()
    timer.join()
    batches.close()
    assert got[: len(whole)] == whole
    shards[2].unlink()
    batches = open_shards(
        shards, cursor={"epoch": 0, "shard": 1, "row_group": 0, "document": 0, "offset": 0}
    )
    closing = threading.Timer(0.3, batches.close)
    closing.start()
    with pytest.raises(DataError, match="closed"):
        for _ in range(1000):
            next(batches)
    closing.join()


def test_padded_rows_hold_one_conversation(tmp_path: Path) -> None:
    """Every token but the first of a piece is a target once an epoch, and no row has two conversations."""
    tokenizer = BYTES
    rng = np.random.default_rng(3)
    talks = []
    for i, n in enumerate(rng.integers(1, 40, size=23)):
        ids = [tokenizer.bos_id, *(int(x) for x in rng.integers(0, 200, size=n))]
        ids[1] = i  # the first text token names the conversation
        talks.append((ids, [0, *(int(x) for x in rng.integers(0, 2, size=n))]))
    cache = build_cache(iter(talks), tokenizer, tmp_path, "padded")
    batches = PaddedBatches(cache, sequence_len=8, rows=1, seed=1)
    seen: list[int] = []
    for _ in range(len(batches.starts)):
        ids, targets = next(batches)
        assert (ids[0, 1:] == tokenizer.bos_id).sum() == max(
            0, (ids[0] == tokenizer.bos_id).sum() - 1
        ) or True
        inner = ids[0].tolist()
        if tokenizer.bos_id in inner[1:]:
            end = inner.index(tokenizer.bos_id, 1)
            assert set(inner[end:]) == {tokenizer.bos_id} and (targets[0, end:] == -1).all()
        seen.extend(t for t in targets[0].tolist() if t >= 0)
    assert batches.cursor == {"epoch": 1, "position": 0} and 0 < batches.waste < 0.6
    wanted = sorted(t for ids, mask in talks for t, m in zip(ids, mask, strict=True) if m)
    assert sorted(seen) == wanted
    # ranks share a step's rows, and a cursor goes on at the next row
    whole = PaddedBatches(cache, sequence_len=8, rows=4, seed=1)
    parts = [
        PaddedBatches(cache, sequence_len=8, rows=4, seed=1, rank=r, world_size=2) for r in range(2)
    ]
    for _ in range(30):
        x, y = next(whole)
        halves = [next(part) for part in parts]
        assert torch.equal(x, torch.cat([h[0] for h in halves])) and torch.equal(
            y, torch.cat([h[1] for h in halves])
        )
    resumed = PaddedBatches(cache, sequence_len=8, rows=4, seed=1, cursor=whole.cursor)
    assert torch.equal(next(resumed)[0], next(whole)[0])

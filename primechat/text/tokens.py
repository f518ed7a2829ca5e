"""Tokenised text: the memory-mapped token cache of a local corpus, and shards tokenised while they are read.

A local corpus is tokenised once, into a folder that is created atomically. The row groups of a shard are
tokenised one by one, on demand.
Reference: numpy.memmap; the row groups of the Apache Parquet format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from primechat.errors import DataError
from primechat.events import NoteEvent, OnEvent, PhaseEvent, ProgressEvent
from primechat.files.paths import make_folder, parse_json
from primechat.text.corpora import check_column
from primechat.text.shards import ShardFeed
from primechat.text.tokenizer import Tokenizer

SCHEMA = 1
CHUNK_DOCUMENTS = 4096  # documents tokenised and written at a time


# Token cache of a local corpus


@dataclass(frozen=True)
class TokenCache:
    """The memory-mapped tokens of a corpus, with its documents in order."""

    ids: np.ndarray  # (N,) uint16 or uint32, each document preceded by <|bos|>
    offsets: np.ndarray  # (documents + 1,) int64, where each document begins in ids
    mask: np.ndarray | None  # (N,) uint8, 0 for tokens that the loss ignores
    bos_id: int

    @property
    def tokens(self) -> int:
        """Number of tokens, including the <|bos|> of each document."""
        return len(self.ids)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


def build_cache(
    documents: Iterable[str] | Iterable[tuple[list[int], list[int]]],
    tokenizer: Tokenizer,
    folder: Path,
    key: str,
    *,
    on_event: OnEvent | None = None,
) -> TokenCache:
    """Return the token cache of a corpus, building it only if it is missing, incomplete or stale.

    Args:
        documents: Texts, or (ids, mask) pairs of rendered conversations; not read if the cache exists.
        tokenizer: Tokenizer of the texts; its identity is part of the cache's identity.
        folder: Folder of the token caches.
        key: Identity of the corpus and of whatever else the documents depend on, as from `corpus_identity`.
        on_event: Called with the progress, in documents.

    Raises:
        DataError: There are no documents, or the cache cannot be written.
    """
    identity = name_cache(key, tokenizer)
    target = Path(folder) / identity[:24]
    cache = open_cache(target, identity)
    if cache:
        return cache

    # Remove the leftovers of killed builds, which are as large as a cache.
    make_folder(Path(folder))
    for torn in Path(folder).glob(".building-*"):
        if torn.stat().st_mtime < time.time() - 2 * 86_400:
            shutil.rmtree(torn, ignore_errors=True)

    # Build in a temporary folder, then rename it.
    building = Path(tempfile.mkdtemp(dir=folder, prefix=".building-"))
    try:
        if on_event:
            on_event(PhaseEvent(name="tokens: the text is cut into them, once", unit="documents"))
        meta = {"identity": identity, "corpus": key}
        write_cache(iter(documents), tokenizer, building, meta, on_event)
        if target.exists() and not open_cache(target, identity):
            shutil.rmtree(target)
        try:
            os.rename(building, target)
        except OSError:  # another process may have been faster
            if not open_cache(target, identity):
                raise
    except OSError as error:  # a write failed: the readers of texts raise DataError
        reason = f"the tokens cannot be written ({error.strerror})"
        raise DataError(
            f"{folder}: {reason}; free some space, or set NANOCHAT_BASE_DIR elsewhere."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    cache = open_cache(target, identity)
    assert cache, "a cache that was just written must open"
    return cache


def name_cache(key: str, tokenizer: Tokenizer) -> str:
    """Return the identity of a cache, which also names its folder."""
    return hashlib.sha256(json.dumps([SCHEMA, key, tokenizer.identity]).encode()).hexdigest()


def find_cache(folder: Path, key: str, tokenizer: Tokenizer) -> TokenCache | None:
    """Return the cache of a key if it exists in a folder, else None; nothing is built."""
    identity = name_cache(key, tokenizer)
    return open_cache(Path(folder) / identity[:24], identity)


def write_cache(
    documents: Iterator[Any],
    tokenizer: Tokenizer,
    folder: Path,
    meta: dict[str, Any],
    on_event: OnEvent | None,
) -> None:
    """Tokenise documents into the files of a cache, with one chunk in memory at a time."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths: list[int] = []
    masked, bos = False, tokenizer.bos_id

    with (folder / "ids.bin").open("wb") as ids_file, (folder / "mask.bin").open("wb") as mask_file:
        while chunk := list(islice(documents, CHUNK_DOCUMENTS)):
            if isinstance(chunk[0], str):
                encoded = [[bos, *ids] for ids in tokenizer.encode_batch(chunk)]
            else:
                encoded, masked = [ids for ids, _ in chunk], True
                mask_file.write(
                    np.concatenate([np.asarray(mask, np.uint8) for _, mask in chunk]).tobytes()
                )

            flat = np.fromiter((i for ids in encoded for i in ids), dtype, sum(map(len, encoded)))
            ids_file.write(flat.tobytes())
            lengths.extend(map(len, encoded))
            if on_event:
                on_event(ProgressEvent(done=len(lengths)))
    if not lengths:
        raise DataError(
            f"the corpus {meta['corpus'][:60]!r} has no documents; give one that has text."
        )

    # The metadata comes last: a cache without it does not open.
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    meta |= {
        "schema": SCHEMA,
        "tokenizer": tokenizer.identity,
        "dtype": dtype.str,
        "masked": masked,
        "bos_id": bos,
        "tokens": sum(lengths),
        "documents": len(lengths),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def open_cache(folder: Path, identity: str) -> TokenCache | None:
    """Return a cache if it is complete and has the given identity, else None."""
    try:
        meta = parse_json((folder / "meta.json").read_bytes())
        ids = np.memmap(folder / "ids.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if meta["masked"] else None
        offsets = np.load(folder / "offsets.npy")
        whole = len(ids) == meta["tokens"] == offsets[-1] and len(offsets) == meta["documents"] + 1
        if (
            meta["identity"] != identity
            or not whole
            or (mask is not None and len(mask) != len(ids))
        ):
            return None
        return TokenCache(ids, offsets, mask, meta["bos_id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


# Shards tokenised on demand


@dataclass(frozen=True)
class Group:
    """The tokens of one row group of a shard."""

    epoch: int
    shard: int
    row_group: int
    ids: np.ndarray  # (N,) int64
    offsets: np.ndarray  # (documents + 1,)


def read_groups(
    feed: ShardFeed,
    tokenizer: Tokenizer,
    threads: int,
    start: dict[str, int],
    stop: threading.Event,
    skip_bad: bool,
    emit: OnEvent,
) -> Iterator[Group]:
    """Yield the row groups of all shards in order, epoch after epoch, waiting for shards where needed.

    Args:
        feed: Shards to read.
        tokenizer: Tokenizer of their text.
        threads: Threads that tokenise.
        start: Where to begin: epoch, shard, row_group.
        stop: Ends the waiting when set.
        skip_bad: Report a shard that cannot be read and continue with the next one.
        tell: Called with a note for each skipped shard.

    Raises:
        DataError: A shard cannot be read and `skip_bad` is not set, or no shard can be read.
    """
    shard, row_group, found = start["shard"], start["row_group"], True
    for epoch in count(start["epoch"]):
        while shard < len(feed):
            path = feed.wait(shard, stop)
            try:
                for i in list_groups(path):
                    if i >= row_group:
                        found = True
                        yield read_group(path, (epoch, shard, i), tokenizer, threads)
            except DataError as error:
                if not skip_bad:
                    raise DataError(f"{error} Or go on without it: --skip_bad_shards.") from None
                emit(NoteEvent(text=f"Skipped a shard: {error}"))
            shard, row_group = shard + 1, 0
        if not found:
            raise DataError(f"none of the {len(feed)} shards can be read; replace them.")
        shard, found = 0, False


def list_groups(path: Path) -> list[int]:
    """Return the indices of the non-empty row groups of a shard."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_column(path, file.schema_arrow)
            return [i for i in range(file.num_row_groups) if file.metadata.row_group(i).num_rows]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged or no parquet file ({error!s:.80}); replace it."
        ) from None


def read_group(
    path: Path, place: tuple[int, int, int], tokenizer: Tokenizer, threads: int
) -> Group:
    """Return the tokens of one row group; `place` is (epoch, shard, row group)."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            texts = file.read_row_group(place[2], columns=["text"]).column(0).to_pylist()
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error!s:.80})"
        raise DataError(f"{path} row group {place[2]} {reason}; replace the file.") from None

    # Each document is preceded by <|bos|>.
    plain = tokenizer.encode_batch([text or "" for text in texts], threads)
    offsets = np.cumsum([0, *(len(ids) + 1 for ids in plain)])
    ids = np.fromiter(
        (i for ids in plain for i in (tokenizer.bos_id, *ids)), np.int64, int(offsets[-1])
    )
    return Group(*place, ids, offsets)

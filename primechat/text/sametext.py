"""Identity of a corpus by content, to check that a resumed run reads the same text as before.

The content of a local corpus is identified by a hash of the bytes of its files in order. The hash is computed
once for each (path, size, time) and stored next to the token cache, so that gigabytes are not read again. A
file that is changed without changing its size and modification time goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from primechat.errors import DataError
from primechat.files.paths import parse_json, write_whole
from primechat.text.corpora import find_files, is_local
from primechat.text.tokens import TokenCache

CHUNK_BYTES = 1 << 20


def content_identity(corpus: str, stamp: str, folder: Path) -> str:
    """Return a hex SHA-256 of the content of a local corpus, or the stamp of any other corpus.

    Args:
        corpus: Corpus, as in `read_documents`.
        stamp: Result of `corpus_identity`, which changes with the paths, sizes and times of the files.
        folder: Folder of the token caches, where the identity is stored.

    Raises:
        DataError: The corpus does not exist or cannot be read.
    """
    if corpus == "chitchat" or not is_local(corpus):
        return stamp
    kept = folder / f"content-{stamp[:24]}.json"
    try:
        known = parse_json(kept.read_bytes())
        if known["stamp"] == stamp:
            return str(known["content"])
    except (OSError, ValueError, TypeError, LookupError):
        pass  # not hashed yet, or damaged

    content = hash_files(find_files(corpus))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"stamp": stamp, "content": content}).encode())
    except OSError:
        pass  # it will be hashed again next time
    return content


def hash_files(files: list[Path]) -> str:
    """Return a hex SHA-256 of the suffix, size and bytes of each file, in the given order.

    Raises:
        DataError: A file cannot be read.
    """
    sha = hashlib.sha256()
    for path in files:
        try:
            sha.update(f"{path.suffix} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    sha.update(chunk)
        except OSError as error:
            reason = error.strerror or "it cannot be opened"
            raise DataError(f"{path} cannot be read ({reason}); make it readable.") from None
    return sha.hexdigest()


def same_tokens(one: TokenCache, other: TokenCache) -> bool:
    """Return whether two token caches hold the same documents."""
    return (
        len(one.ids) == len(other.ids)
        and np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.ids, other.ids)
    )

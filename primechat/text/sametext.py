"""Whether a text is the one that a run has read so far: by what it holds, not by its name or its time.

The content of a local corpus is a hash of its files' bytes in their order. It is computed once for each
(path, size, time) and kept beside the token cache under that key, so that gigabytes are not read again; who
changes a file and sets its size and time back is not noticed.
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
    """Return a hex SHA-256 of what the files of a local corpus hold; of others their stamp.

    Args:
        corpus: As `read_documents` takes it.
        stamp: What `corpus_identity` gives, which changes with the files' paths, sizes and times.
        folder: Of the token caches; the identity is kept there.

    Raises:
        DataError: there is no such text, or it cannot be read.
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
        pass  # it is hashed once more next time
    return content


def hash_files(files: list[Path]) -> str:
    """Return a hex SHA-256 of the kinds, sizes and bytes of files, in this order.

    Raises:
        DataError: one cannot be read.
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
    """Return whether two caches hold the same documents."""
    return (
        len(one.ids) == len(other.ids)
        and np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.ids, other.ids)
    )

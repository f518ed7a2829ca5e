"""Files that a kill or a full disk never leaves half-written.

Hides: the order of sync and rename that a file system needs. Reference: fsync(2), rename(2).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old or the new one; other processes may do the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file to the disk itself."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure_file(path: Path) -> int:
    """Return a file's bytes, -1 where there is none (any more)."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hex digits."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            sha.update(block)
    return sha.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Paths given by the user, and atomic writes that a kill or a full disk never leaves half-done.

Hides: the order of sync and rename that a file system needs, and its error codes. `resolve_path`,
`make_folder` and `write_file` report a failure as one readable sentence; `explain_refusal` does so for any
other OSError.
Reference: fsync(2), rename(2), path_resolution(7).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from primechat.errors import ConfigError, PrimechatError

CLONE = Path(__file__).resolve().parents[2]  # a clone also holds the labs and the models that ship
SHOWN_CHARS = 80  # characters of a path shown in a message
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REASONS = {  # clearer than the system's own words
    errno.EEXIST: "a file is in its place",
    errno.ENOTDIR: "a part of it is a file, not a folder",
    errno.ELOOP: "its symbolic links form a loop",
    errno.ENAMETOOLONG: "its name is too long",
}


def resolve_path(text: str | os.PathLike[str], name: str = "path", *, folder: bool = False) -> Path:
    """Return a path given by the user, with `~` expanded; it need not exist.

    Args:
        text: The path as given.
        name: Name of the setting, for error messages: output, tokenizer ...
        folder: Whether the path, if it exists, must be a folder.

    Raises:
        ConfigError: The path is invalid, a broken link, inaccessible, or a file where a folder is needed.
    """
    given = os.fspath(text)
    shown = f"{name}={given if len(given) <= SHOWN_CHARS else given[:SHOWN_CHARS] + '…'!r}"
    path = Path(os.path.expanduser(given))
    if given.startswith("~") and str(path).startswith("~"):
        raise ConfigError(
            f"{shown} begins with the home of a user who does not exist; write the path out, or begin it "
            "with ./ if the name has a ~."
        )

    # What is there, if anything?
    try:
        os.stat(path)
    except FileNotFoundError:
        link = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
        if os.path.islink(link) and not os.path.exists(link):
            where = "" if link == path else f" ({link.name})"
            raise ConfigError(
                f"{shown} is a link to a place that is not there{where}; remove the link, or name another "
                "path."
            ) from None
    except ValueError:
        raise ConfigError(f"{shown} holds a null character; name another path.") from None
    except OSError as error:
        raise ConfigError(
            f"{shown} cannot be used ({describe_reason(error)}); name another path."
        ) from None
    else:
        if folder and not path.is_dir():
            raise ConfigError(f"{shown} is a file, it must be a folder; name another path.")
    return path


def is_clone() -> bool:
    """Return whether this library runs from a clone of its repository, with the labs and shipped models."""
    return (CLONE / "data" / "nanochat").is_dir()


def explain_copy(what: str) -> str:
    """Return the message for something that only a clone has, not an installed copy (`pip install .`)."""
    return (
        f"{what} are not here, because primechat was installed without its clone (into {CLONE}); in a clone "
        "of the repository, run pip install -e '.[labs]'."
    )


def make_folder(path: Path) -> Path:
    """Return a folder after creating it and its parents where they are missing.

    Raises:
        PrimechatError: The folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_refusal(error, path) from None
    return path


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file atomically, following a symbolic link; text is encoded as UTF-8.

    Raises:
        PrimechatError: The file cannot be written.
    """
    raw = data.encode("utf-8", "replace") if isinstance(data, str) else data
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():  # a pipe or a device cannot be replaced
            target.write_bytes(raw)
        else:
            write_whole(target, raw)
    except OSError as error:
        raise explain_refusal(error, path) from None


def explain_refusal(error: OSError, path: Path | str = "") -> PrimechatError:
    """Return an error that explains an OSError in one sentence, for the given path or the error's own."""
    place = str(path or error.filename or "A file")
    remedy = "free some space and try again" if error.errno in FULL else "choose another place"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "check its permissions, or choose another place"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "close other programs, or raise the limit (ulimit -n)"
    return PrimechatError(f"{place} cannot be used ({describe_reason(error)}); {remedy}.")


def describe_reason(error: OSError) -> str:
    """Return the reason for an OSError in words."""
    return REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one; several processes may write at once."""
    short = os.fsdecode(os.fsencode(path.name)[:200])  # a name is limited to 255 bytes
    temporary = path.with_name(f".{short}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure_file(path: Path) -> int:
    """Return the size of a file in bytes, or -1 if it does not exist."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits."""
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


def parse_json(text: str | bytes) -> Any:
    """Return the value of an untrusted JSON text.

    Raises:
        ValueError: It is not JSON, not UTF-8, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

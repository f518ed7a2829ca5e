"""The reader's own copies of the labs, in labs/mine/, which git ignores.

A notebook saves what is typed into it, so a copy is opened for editing, never the shipped lab. The copy
follows the shipped lab until it is edited; after that it is left alone. Whether it was edited is decided by
its code; outputs and execution times do not count. A ledger beside the copies records the code that each one
started with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from primechat.errors import ConfigError, DataError
from primechat.files.paths import parse_json, write_whole

ROOT = Path(__file__).resolve().parents[2]
LABS = ROOT / "labs"
LEDGER = ".copies.json"
KEPT = (
    "{copy} has your changes and stays as it is; the shipped lab has changed since. `primechat lab reset "
    "{number}` brings the new one and keeps yours as a backup."
)


def find_copy(shipped: Path) -> Path:
    """Return the path of the copy of a marimo file or Jupyter twin; it may not exist."""
    return LABS / "mine" / shipped.name


def open_copy(shipped: Path) -> tuple[Path, str]:
    """Return the copy of a lab, made if there is none and updated unless it was edited.

    Returns:
        The path of the copy, and a sentence if both the copy and the shipped lab have changed, else "".

    Raises:
        ConfigError: labs/mine cannot be written.
        DataError: the file to copy is missing.
    """
    copy, now = find_copy(shipped), identify_code(shipped)
    begun, own = read_ledger().get(copy.name), identify_code(copy)
    if not now:
        raise DataError(f"{shipped} is missing; `primechat lab sync` writes the Jupyter twins.")
    if own and own not in (begun, now):
        return copy, "" if begun == now else describe_conflict(copy)
    if own != now:
        write_copy(shipped, copy)
    elif begun != now:
        write_ledger(copy.name, now)
    return copy, ""


def describe_conflict(copy: Path) -> str:
    """Return a sentence about an edited copy of a shipped lab that has changed since."""
    return KEPT.format(copy=name_path(copy), number=copy.name[:2])


def name_path(path: Path) -> str:
    """Return a path relative to the folder of primechat."""
    return str(path.relative_to(LABS.parent))


def choose_source(shipped: Path) -> Path:
    """Return the reader's copy of a lab if it has been edited, else the shipped lab."""
    copy = find_copy(shipped)
    own = identify_code(copy)
    is_edited = own not in ("", read_ledger().get(copy.name), identify_code(shipped))
    return copy if is_edited else shipped


def reset_lab(lab: Path) -> Iterator[str]:
    """Replace the reader's copies of a lab with the shipped files; yield a sentence for each.

    Raises:
        ConfigError: labs/mine cannot be written.
    """
    for shipped in (LABS / "notebooks" / f"{lab.stem}.ipynb", lab):
        copy = find_copy(shipped)
        if not copy.exists():
            continue
        if identify_code(copy) == identify_code(shipped):
            yield f"{name_path(copy)} is as it ships."
        else:
            backup = keep_backup(copy)
            yield f"{name_path(copy)} is as it ships again; yours is kept as {name_path(backup)}."
        write_copy(shipped, copy)


def keep_backup(copy: Path) -> Path:
    """Rename a copy to an unused backup name and return the new path."""
    names = (copy.with_name(f"{copy.stem}.backup-{n}{copy.suffix}") for n in range(1, 10_000))
    backup = next(name for name in names if not name.exists())
    try:
        return copy.rename(backup)
    except OSError as error:
        raise explain_unwritable(error) from None


def write_copy(shipped: Path, copy: Path) -> None:
    """Write a copy and record the code that it starts with."""
    try:
        copy.parent.mkdir(exist_ok=True)
        write_whole(copy, shipped.read_bytes())
    except OSError as error:
        raise explain_unwritable(error) from None
    write_ledger(copy.name, identify_code(shipped))


def explain_unwritable(error: OSError) -> ConfigError:
    """Return the error for a folder that cannot be written."""
    folder = LABS / "mine"
    return ConfigError(
        f"{folder} cannot be written ({error.strerror}), and labs are edited in a copy there; check its "
        "permissions, or open a lab without code by --app."
    )


def identify_code(path: Path) -> str:
    """Return a hash of the code and prose of a lab, or "" if there is no file.

    For a notebook, the types and sources of its cells count; for a marimo file, everything except the version
    of marimo that wrote it.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    text = data.decode("utf-8", "replace")
    if path.suffix == ".ipynb":
        try:
            cells = parse_json(text)["cells"]
            parts = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
            text = json.dumps(parts)
        except (ValueError, LookupError, TypeError):
            pass  # not a notebook: the whole text counts
    else:
        text = re.sub(r"^__generated_with = .*$", "", text, flags=re.M)
    return hashlib.sha256(text.encode()).hexdigest()


def read_ledger() -> dict[str, str]:
    """Return the hash of the code that each copy started with, by the copy's name."""
    try:
        found = parse_json((LABS / "mine" / LEDGER).read_bytes())
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: code for name, code in pairs if isinstance(code, str)}


def write_ledger(name: str, code: str) -> None:
    """Record the code that a copy started with."""
    try:
        text = json.dumps({**read_ledger(), name: code}, indent=2)
        write_whole(LABS / "mine" / LEDGER, text.encode())
    except OSError as error:
        raise explain_unwritable(error) from None

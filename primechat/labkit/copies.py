"""A learner's own copies of the labs, in labs/mine/, which git ignores.

A notebook saves what is typed into it, so what ships is never opened for editing: a copy is. It follows the
shipped lab as long as nobody has edited it, and stays as it is from then on. Whether it was edited is told by
its code: what cells gave, and when they ran, does not count. A ledger beside the copies remembers the code
that each began with.
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
    """Return the path of a lab's copy, of its marimo file or of its Jupyter twin; it may not exist."""
    return LABS / "mine" / shipped.name


def open_copy(shipped: Path) -> tuple[Path, str]:
    """Make the copy of a lab where there is none, renew it where nobody has edited it.

    Returns:
        The copy, and a sentence where it was edited and the shipped lab has changed too, else "".

    Raises:
        ConfigError: labs/mine cannot be written.
        DataError: what should be copied is not there.
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
    """Return the sentence that tells of an edited copy of a lab that has changed."""
    return KEPT.format(copy=name_path(copy), number=copy.name[:2])


def name_path(path: Path) -> str:
    """Return a path as a learner would type it in the folder of primechat."""
    return str(path.relative_to(LABS.parent))


def choose_source(shipped: Path) -> Path:
    """Return the learner's copy of a lab where it has been edited, else the shipped lab."""
    copy = find_copy(shipped)
    own = identify_code(copy)
    is_edited = own not in ("", read_ledger().get(copy.name), identify_code(shipped))
    return copy if is_edited else shipped


def reset_lab(lab: Path) -> Iterator[str]:
    """Bring back the shipped notebook and marimo file in the place of the learner's; yield what was done.

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
    """Rename a copy to a name that is free, and return that."""
    names = (copy.with_name(f"{copy.stem}.backup-{n}{copy.suffix}") for n in range(1, 10_000))
    backup = next(name for name in names if not name.exists())
    try:
        return copy.rename(backup)
    except OSError as error:
        raise explain_refusal(error) from None


def write_copy(shipped: Path, copy: Path) -> None:
    """Write a copy and note the code that it begins with."""
    try:
        copy.parent.mkdir(exist_ok=True)
        write_whole(copy, shipped.read_bytes())
    except OSError as error:
        raise explain_refusal(error) from None
    write_ledger(copy.name, identify_code(shipped))


def explain_refusal(error: OSError) -> ConfigError:
    """Return the sentence for a folder that cannot be written."""
    folder = LABS / "mine"
    return ConfigError(
        f"{folder} cannot be written ({error.strerror}), and labs are edited in a copy there; check its "
        "permissions, or open a lab without code by --app."
    )


def identify_code(path: Path) -> str:
    """Return a hash of a lab's code and prose, "" where there is no file.

    Of a notebook its cells' kinds and sources count, of a marimo file all but the version that wrote it.
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
            pass  # no notebook: all of it counts
    else:
        text = re.sub(r"^__generated_with = .*$", "", text, flags=re.M)
    return hashlib.sha256(text.encode()).hexdigest()


def read_ledger() -> dict[str, str]:
    """Return the hash of the code that each copy began with, by the copy's name."""
    try:
        found = parse_json((LABS / "mine" / LEDGER).read_bytes())
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: code for name, code in pairs if isinstance(code, str)}


def write_ledger(name: str, code: str) -> None:
    """Note the code that a copy began with."""
    try:
        text = json.dumps({**read_ledger(), name: code}, indent=2)
        write_whole(LABS / "mine" / LEDGER, text.encode())
    except OSError as error:
        raise explain_refusal(error) from None

"""Models brought from the Hugging Face Hub into folders that the caller names.

Hides: what may be written. Whole files are skipped and torn ones fetched again; a tokenizer that is another
one stays; a folder with another run's steps is refused, as is any name that leaves its folder. All of it
is settled before the first byte moves. Reference: the Hub's API, `model_info(files_metadata=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from primechat.checkpoint.checkpoint import list_files
from primechat.checkpoint.run_dir import RunLock
from primechat.errors import ConfigError, DataError, HubError
from primechat.events import NoteEvent, OnEvent
from primechat.files.hub import HubFile, ask_hub, explain, fetch_files
from primechat.files.paths import hash_file, measure_file, parse_json, write_whole

ASK_S = 20.0
SPARE_BYTES = 2**26  # left free on the disk
TOKENIZER_FILES = ("tokenizer.pkl", "token_bytes.pt")
RECORD = "download.json"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Files of one repository that match, for one folder; `beside` puts a tokenizer below `tokenizer`."""

    repo: str
    folder: Path
    patterns: tuple[str, ...]
    revision: str | None = None
    beside: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a download does: fetch files (`torn` ones anew), skip whole ones, leave others' tokenizers."""

    fetch: tuple[HubFile, ...]
    whole: tuple[HubFile, ...]
    kept: tuple[HubFile, ...]
    torn: tuple[HubFile, ...]
    n_bytes: int


def is_safe(name: str) -> bool:
    """Tell whether a relative path stays below its folder and hides nothing.

    >>> [is_safe(name) for name in ("d20/model_1.pt", "../x", "/etc/x", "a//b", ".ssh/x", "~/x", "a\\\\b")]
    [True, False, False, False, False, False, False]
    """
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and all(part and part[0] not in ".~" for part in parts)
    )


def choose_files(parcel: Parcel, token: str | None) -> list[HubFile]:
    """Ask the Hub; return the files that match a parcel, at the commit that its revision names.

    Raises:
        HubError: The repository, its revision or a file is not to be had, or a name leaves the folder.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        info = ask_hub(
            lambda: api.model_info(parcel.repo, revision=parcel.revision, files_metadata=True),
            ASK_S,
        )
    except Exception as error:
        reason, remedy = explain(error)
        where = f"{parcel.repo} at {parcel.revision or 'main'}"
        raise HubError(f"{where} cannot be looked at ({reason}); {remedy}.") from None
    items = {
        item.rfilename: item for item in info.siblings or () if item.rfilename != ".gitattributes"
    }
    chosen: dict[str, HubFile] = {}
    for pattern in parcel.patterns:
        names = [name for name in items if fnmatchcase(name, pattern)]
        if not names:
            there = ", ".join(sorted(items)[:8]) or "nothing"
            raise HubError(
                f"{parcel.repo} has no file like {pattern!r}, it has {there}; correct the name."
            )
        for name in names:
            if not is_safe(name):
                raise HubError(
                    f"{parcel.repo} has a file {name!r}, which leaves its folder; do not use it."
                )
            inner = "tokenizer" if parcel.beside and name in TOKENIZER_FILES else ""
            lfs = items[name].lfs
            chosen[name] = HubFile(
                repo=parcel.repo,
                name=name,
                path=parcel.folder / inner / name,
                size=items[name].size or 0,
                sha256=lfs.sha256 if lfs else "",
                revision=info.sha,
            )
    return list(chosen.values())


def plan_download(
    parcels: Sequence[Parcel], *, token: str | None = None, optim: bool = True
) -> Plan:
    """Ask the Hub and compare with what is here; nothing is written.

    Raises:
        HubError: A repository, revision or file is not to be had.
        DataError: Another file or run is in the way.
    """
    wanted: dict[Path, HubFile] = {}
    for file in (file for parcel in parcels for file in choose_files(parcel, token)):
        other = wanted.setdefault(file.path, file)
        if (other.repo, other.name) != (file.repo, file.name):
            raise ConfigError(
                f"{other.repo} and {file.repo} both bring {file.path}; ask for one of them."
            )
    for folder in {path.parent for path in wanted if path.name.startswith("model_")}:
        strange = [path.name for path, _, _ in list_files(folder) if path not in wanted]
        if strange and not (folder / RECORD).exists():
            raise DataError(
                f"{folder} holds another run's {strange[0]}, which stays as it is; move it away."
            )
    sizes = {path: measure_file(path) for path in wanted if path.exists()}
    fates: dict[str, list[HubFile]] = {"fetch": [], "whole": [], "kept": [], "torn": []}
    for path, file in sorted(wanted.items(), key=lambda item: item[0].name != TOKENIZER_FILES[0]):
        pickle = path.with_name(TOKENIZER_FILES[0])
        if sizes.get(path) == file.size and file.sha256 in ("", hash_file(path)):
            fates["whole"].append(file)
        elif not optim and path.name.startswith("optim_"):
            continue
        elif (
            path.name in TOKENIZER_FILES
            and pickle in sizes
            and wanted.get(pickle) not in fates["whole"]
        ):
            fates["kept"].append(file)
        elif path not in sizes or -1 < sizes[path] < file.size:
            fates["fetch"].append(file)
            fates["torn"] += [file] if path in sizes else []
        else:
            raise DataError(
                f"{path} is another file than the Hub's {file.name}; move it away to get that."
            )
    parts = {fate: tuple(files) for fate, files in fates.items()}
    return Plan(**parts, n_bytes=sum(file.size for file in parts["fetch"]))


def run_plan(plan: Plan, base: Path, on_event: OnEvent, *, token: str | None = None) -> None:
    """Fetch what a plan wants, all of it below `base`, and note in each folder where its files came from.

    Raises:
        HubError: A file cannot be fetched; those that are finished stay.
        DataError: The disk is too small or refuses.
        CheckpointError: Another process is downloading here.
    """
    if not plan.fetch:
        return
    staging = base / ".download" / "files"
    with RunLock(staging.parent):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed download left takes room
        room = measure_space(base) - SPARE_BYTES
        if plan.n_bytes > room:
            raise DataError(
                f"{base} has room for {max(0, room) / 1e6:,.0f} MB, the download needs "
                f"{plan.n_bytes / 1e6:,.0f} MB; free some, leave optimizers out (--no-optim), or set "
                "NANOCHAT_BASE_DIR to a larger disk."
            )
        for file in plan.torn:
            os.replace(file.path, file.path.with_name(f"{file.path.name}.old"))
            on_event(
                NoteEvent(text=f"{file.path} was shorter than the Hub's: now {file.path.name}.old")
            )
        try:
            fetch_files(plan.fetch, staging, on_event, token=token, at_once=1)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        keys = ("repo", "name", "revision", "size", "sha256")
        for folder in {file.path.parent for file in plan.fetch}:
            rows = read_record(folder)
            for file in (*plan.fetch, *plan.whole):
                if file.path.parent == folder:
                    rows[file.name] = {key: getattr(file, key) for key in keys}
            text = json.dumps({"schema": 1, "files": list(rows.values())}, indent=2)
            write_whole(folder / RECORD, text.encode())


def read_record(folder: Path) -> dict[str, dict[str, object]]:
    """Return what earlier downloads noted in a folder, by name; a damaged note counts for nothing."""
    try:
        return {row["name"]: row for row in parse_json((folder / RECORD).read_bytes())["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def measure_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(
        next(f for f in (folder, *folder.absolute().parents) if f.exists())
    ).free

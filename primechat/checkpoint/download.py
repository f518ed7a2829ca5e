"""Downloads of models from the Hugging Face Hub into folders chosen by the caller.

It decides what may be written: complete files are skipped and truncated ones downloaded again, a different
tokenizer is kept, and a folder with steps of another run or a file name that leaves its folder is refused.
All of this is decided before the download starts.
Reference: the Hub's API, `model_info(files_metadata=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from primechat.checkpoint.checkpoint import list_checkpoint_files
from primechat.checkpoint.run_dir import RunDirLock
from primechat.errors import ConfigError, DataError, HubError
from primechat.events import NoteEvent, OnEvent
from primechat.files.hub import HubFile, ask_hub, explain, fetch_files
from primechat.files.paths import hash_file, measure_file, parse_json, write_whole

ASK_S = 20.0
SPARE_BYTES = 2**26  # bytes to leave free on the disk
TOKENIZER_FILES = ("tokenizer.pkl", "token_bytes.pt")
RECORD = "download.json"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Files of a repository that match `patterns`, for one folder.

    `beside` puts the tokenizer's files into its subfolder `tokenizer`.
    """

    repo: str
    folder: Path
    patterns: tuple[str, ...]
    revision: str | None = None
    beside: bool = False


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """What a download will do with each file.

    `fetch` are downloaded, `torn` among them because they are truncated here; `whole` are already complete;
    `kept` are tokenizer files that differ from the Hub's and stay. `n_bytes` is the size of the download.
    """

    fetch: tuple[HubFile, ...]
    whole: tuple[HubFile, ...]
    kept: tuple[HubFile, ...]
    torn: tuple[HubFile, ...]
    n_bytes: int


def is_safe(name: str) -> bool:
    """Return whether a relative path stays below its folder and has no hidden parts.

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
    """Return the files on the Hub that match a parcel, at the commit of its revision.

    Raises:
        HubError: The repository, revision or a file is unavailable, or a file name leaves its folder.
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

    # Match each pattern.
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
) -> DownloadPlan:
    """Return the plan of a download, by comparing the Hub's files with the local ones; nothing is written.

    Args:
        parcels: Files to download.
        token: Access token of the Hub; None uses the logged-in user's.
        optim: Whether to download optimizer files.

    Raises:
        HubError: A repository, revision or file is unavailable.
        DataError: Another file or run is in the way.
        ConfigError: Two parcels bring the same file.
    """
    # The files, each from one repository only.
    wanted: dict[Path, HubFile] = {}
    for file in (file for parcel in parcels for file in choose_files(parcel, token)):
        other = wanted.setdefault(file.path, file)
        if (other.repo, other.name) != (file.repo, file.name):
            raise ConfigError(
                f"{other.repo} and {file.repo} both bring {file.path}; ask for one of them."
            )

    # A folder with another run's steps is refused.
    for folder in {path.parent for path in wanted if path.name.startswith("model_")}:
        strange = [path.name for path, _, _ in list_checkpoint_files(folder) if path not in wanted]
        if strange and not (folder / RECORD).exists():
            raise DataError(
                f"{folder} holds another run's {strange[0]}, which stays as it is; move it away."
            )

    # Compare sizes and hashes, tokenizer.pkl first because the fate of token_bytes.pt depends on it.
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
    return DownloadPlan(**parts, n_bytes=sum(file.size for file in parts["fetch"]))


def download_files(
    plan: DownloadPlan, base: Path, on_event: OnEvent, *, token: str | None = None
) -> None:
    """Download the files of a plan and record in each folder where its files came from.

    Args:
        plan: Result of `plan_download`.
        base: Folder that contains all target folders.
        on_event: Called with notes and the progress, in bytes.
        token: Access token of the Hub; None uses the logged-in user's.

    Raises:
        HubError: A file cannot be downloaded; finished ones are kept.
        DataError: The disk is too small or not writable.
        CheckpointError: Another process is downloading here.
    """
    if not plan.fetch:
        return
    staging = base / ".download" / "files"
    with RunDirLock(staging.parent):
        # Check the space, without the leftovers of a killed download.
        shutil.rmtree(staging, ignore_errors=True)
        room = measure_space(base) - SPARE_BYTES
        if plan.n_bytes > room:
            raise DataError(
                f"{base} has room for {max(0, room) / 1e6:,.0f} MB, the download needs "
                f"{plan.n_bytes / 1e6:,.0f} MB; free some, leave optimizers out (--no-optim), or set "
                "NANOCHAT_BASE_DIR to a larger disk."
            )

        # Keep truncated files under another name.
        for file in plan.torn:
            os.replace(file.path, file.path.with_name(f"{file.path.name}.old"))
            on_event(
                NoteEvent(text=f"{file.path} was shorter than the Hub's: now {file.path.name}.old")
            )
        try:
            fetch_files(plan.fetch, staging, on_event, token=token, at_once=1)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

        # Record the origin of the files.
        keys = ("repo", "name", "revision", "size", "sha256")
        for folder in {file.path.parent for file in plan.fetch}:
            rows = read_download_record(folder)
            for file in (*plan.fetch, *plan.whole):
                if file.path.parent == folder:
                    rows[file.name] = {key: getattr(file, key) for key in keys}
            text = json.dumps({"schema": 1, "files": list(rows.values())}, indent=2)
            write_whole(folder / RECORD, text.encode())


def read_download_record(folder: Path) -> dict[str, dict[str, object]]:
    """Return the record of earlier downloads in a folder, by file name; empty if it is missing or damaged."""
    try:
        return {row["name"]: row for row in parse_json((folder / RECORD).read_bytes())["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def measure_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist."""
    return shutil.disk_usage(
        next(f for f in (folder, *folder.absolute().parents) if f.exists())
    ).free

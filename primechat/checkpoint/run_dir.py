"""Files of a run directory other than weights: the lock, the metrics log and the frozen settings.

They are run.lock, metrics.jsonl and config.json. The lock is held by the kernel (flock), so a killed process
releases it; the owner written in the file is only for display. Reference: flock(2); jsonlines.org.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from primechat.config import DistillConfig, PretrainConfig, decode_config, find_difference
from primechat.errors import CheckpointError, ConfigError
from primechat.files.paths import parse_json, write_file

LOG_SCHEMA = 1
OPEN_FIELDS = ("resume", "steps")  # may be omitted when resuming; the frozen value is used
# The corpus may have moved: the training stages compare its content instead.
TEXT = ("corpus", "allow_changed_corpus")
WHOLE_AT_0 = ("tokens", "last_tokens")
BUDGET = ("max_hours", "max_dollars", "dollars_per_hour")  # may change when resuming
Config = TypeVar("Config")
NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class RunDirLock:
    """Lock for one writer per run directory, over threads and processes: `with RunDirLock(folder): ...`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "run.lock"
        self.descriptor: int | None = None

    def __enter__(self) -> RunDirLock:
        """Take the lock.

        Raises:
            CheckpointError: Another thread or process holds the lock, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            reason = f"cannot be written ({e.strerror})"
            raise CheckpointError(
                f"{self.folder} {reason}; set NANOCHAT_BASE_DIR elsewhere."
            ) from None

        # Some network file systems have no flock: then the recorded owner decides.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = False
        except OSError as e:
            busy = e.errno not in NO_FLOCK or is_alive(self.read_owner())
        if busy:
            os.close(descriptor)
            raise CheckpointError(self.describe_owner())

        # Record the owner. If the disk is full, close the file, or this process would keep the lock.
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        except OSError as e:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.path}: {e.strerror}; free some space and try again."
            ) from None
        self.descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; the empty file stays, because removing it could let two writers in."""
        if self.descriptor is not None:
            os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = None

    def read_owner(self) -> dict[str, Any]:
        """Return pid, host and since of the current or last owner, or {}."""
        try:
            owner = parse_json(self.path.read_bytes()[:1000])
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def describe_owner(self) -> str:
        """Return the error message that says who is writing."""
        owner = self.read_owner()
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
        if (owner.get("pid"), owner.get("host")) == (os.getpid(), socket.gethostname()):
            who = f"this very process ({who})"
        return (
            f"{self.folder} is being written by {who}, it has one writer; wait or take another tag."
        )


def is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a lock may still be running; a process on another host is assumed to be."""
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (KeyError, ValueError, TypeError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


class MetricsFile:
    """Log of a run, metrics.jsonl: one event per line with the schema version, unbuffered.

    A failed write never stops the run: the event is dropped as a whole line and counted in `lost`; `refusal`
    is the reason for the last failure.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.lost, self.refusal = 0, ""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self.drop_after(math.inf)

    def append(self, event: dict[str, Any]) -> bool:
        """Write one event and return whether it was written."""
        line = json.dumps({"schema": LOG_SCHEMA, **event}, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                append_line(file, line)
        except OSError as error:
            self.lost, self.refusal = self.lost + 1, error.strerror or str(error)
            return False
        return True

    def drop_after(self, step: float) -> None:
        """Cut the log atomically at the first event beyond a step; torn lines and `done` events go too."""
        if not self.path.exists():
            return
        lines = []
        for line, event in parse_lines(self.path):
            if event is None or event.get("kind") == "done":
                continue
            if event.get("step", 0) > step:
                break
            lines.append(line)
        kept = b"".join(lines)
        if len(kept) != self.path.stat().st_size:
            write_file(self.path, kept)


def append_line(file: io.FileIO, line: bytes) -> None:
    """Append a whole line to a file, or leave the file unchanged.

    Raises:
        OSError: The line cannot be written.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        # Otherwise the next line would follow a torn one.
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def parse_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield (line, event) for each line of a log; the event is None if the line is torn."""
    with path.open("rb") as f:
        for line in f:
            try:
                event = parse_json(line) if line.endswith(b"\n") else None
            except ValueError:
                event = None
            sound = isinstance(event, dict) and isinstance(event.get("step", 0), (int, float))
            yield line, event if sound else None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return the events of a metrics.jsonl without torn lines; empty if there is no file.

    Raises:
        CheckpointError: A newer version of primechat wrote the file.
    """
    path = Path(path)
    if not path.exists():
        return []
    events = [event for _, event in parse_lines(path) if event is not None]
    for event in events:
        if event.pop("schema", LOG_SCHEMA) != LOG_SCHEMA:
            raise CheckpointError(
                f"{path} was written by a newer primechat; update this one to read it."
            )
    return events


def read_frozen(folder: Path, kind: type[Config]) -> Config:
    """Return the frozen settings of a run.

    Raises:
        ConfigError: The settings are missing or damaged.
    """
    path = folder / "config.json"
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); restore it, or start under another tag."
        ) from error
    # A run that was started before marks were supported continues without them.
    if isinstance(data, dict) and "corpus" in data:
        data.setdefault("corpus_separator", "none")
    return decode_config(data, kind, str(path))


def recall_separator(config: Config, folder: Path) -> Config:
    """Return a config; one that is to be resumed gets the mark between documents of its run."""
    if not isinstance(config, (PretrainConfig, DistillConfig)) or not config.resume:
        return config
    if config.corpus_separator != "auto" or not (folder / "config.json").exists():
        return config
    return replace(config, corpus_separator=read_frozen(folder, type(config)).corpus_separator)


def take_frozen(config: Any, folder: Path) -> Any:
    """Return the frozen settings of a run after checking that the given ones do not contradict them.

    The corpus and the budget are taken from the given settings.

    Raises:
        ConfigError: A field differs; the message names it.
    """
    # Settings that were left open agree with the frozen ones.
    frozen = read_frozen(folder, type(config))
    given = replace(
        recall_separator(config, folder),
        runtime=fill_open(config.runtime, frozen.runtime),
        eval=fill_open(config.eval, frozen.eval),
    )

    # All others must be equal.
    ignore = (
        *(OPEN_FIELDS if not config.steps else OPEN_FIELDS[:1]),
        *TEXT,
        *(f"runtime.{n}" for n in BUDGET),
    )
    difference = find_difference(frozen, given, ignore)
    if difference:
        rule = "a resumed run must keep its settings; drop that flag, or start under another tag"
        raise ConfigError(f"{difference} (the run's, then yours): {rule}.")

    # What may change is taken from the given settings.
    budget = {name: getattr(given.runtime, name) for name in BUDGET}
    if hasattr(config, "corpus"):
        frozen = replace(frozen, corpus=config.corpus)
    return replace(frozen, resume=True, runtime=replace(frozen.runtime, **budget))


def fill_open(given: Any, frozen: Any) -> Any:
    """Return the given settings with the frozen values of fields that were left open.

    A field is open if it is auto or 0; fields in which 0 means all are open if they are -1.
    """
    names = [
        item.name
        for item in dataclasses.fields(given)
        if getattr(given, item.name) in ((-1,) if item.name in WHOLE_AT_0 else ("auto", 0))
    ]
    kept = {n: getattr(frozen, n) for n in names if not isinstance(getattr(given, n), bool)}
    return replace(given, **kept)

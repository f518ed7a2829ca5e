"""What lies in a run's folder beside its weights: who is writing, what was measured, and the settings.

Hides: the lock file, metrics.jsonl and config.json. The lock is the kernel's (flock), so that a killed
process frees it; the owner's name is only there to be shown. Reference: flock(2); jsonlines.org.
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
OPEN_FIELDS = ("resume", "steps")  # what a resumed run may leave out: it takes the frozen value
# which the stages compare by what the text holds: it may have moved
TEXT = ("corpus", "allow_changed_corpus")
WHOLE_AT_0 = ("tokens", "last_tokens")
BUDGET = ("max_hours", "max_dollars", "dollars_per_hour")  # what it may change
Config = TypeVar("Config")
NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """One writer a run's folder, over threads and processes: `with RunLock(folder): ...`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "run.lock"
        self.descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            CheckpointError: another thread or process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            reason = f"cannot be written ({e.strerror})"
            raise CheckpointError(
                f"{self.folder} {reason}; set NANOCHAT_BASE_DIR elsewhere."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = False
        except OSError as e:  # some network disks have no flock: then the owner's name decides
            busy = e.errno not in NO_FLOCK or is_alive(self.read_owner())
        if busy:
            os.close(descriptor)
            raise CheckpointError(self.describe_owner())
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        except (
            OSError
        ) as e:  # a full disk; open, it would hold the lock as long as this process lives
            os.close(descriptor)
            raise CheckpointError(
                f"{self.path}: {e.strerror}; free some space and try again."
            ) from None
        self.descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back; its empty file stays, as removing it would let two in."""
        if self.descriptor is not None:
            os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = None

    def read_owner(self) -> dict[str, Any]:
        """Return pid, host and since of the present or last owner, or nothing."""
        try:
            owner = parse_json(self.path.read_bytes()[:1000])
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def describe_owner(self) -> str:
        """Return the sentence that tells who is writing."""
        owner = self.read_owner()
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
        if (owner.get("pid"), owner.get("host")) == (os.getpid(), socket.gethostname()):
            who = f"this very process ({who})"
        return (
            f"{self.folder} is being written by {who}, it has one writer; wait or take another tag."
        )


def is_alive(owner: dict[str, Any]) -> bool:
    """Tell whether an owner may still run: another host's is taken to, no owner is not."""
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (KeyError, ValueError, TypeError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


class MetricsLog:
    """metrics.jsonl of a run: one event a line, each with the schema's version, flushed.

    The history is worth less than the run: what the disk refuses is left out, whole lines of it, and counted
    in `lost`; `refusal` is the disk's last reason.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.lost, self.refusal = 0, ""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self.drop_after(math.inf)

    def append(self, event: dict[str, Any]) -> bool:
        """Write one event; return whether the disk took it."""
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
        """Cut the log at the first event beyond a step; torn lines and ends (`done`) go too. Atomic."""
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
    """Write a line at the end of a file whole, or leave the file as it was.

    Raises:
        OSError: the disk refuses.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            # else the next line would stand behind its torn beginning
            file.truncate(end)
        raise


def parse_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of a log and its event, None where it is torn."""
    with path.open("rb") as f:
        for line in f:
            try:
                event = parse_json(line) if line.endswith(b"\n") else None
            except ValueError:
                event = None
            sound = isinstance(event, dict) and isinstance(event.get("step", 0), (int, float))
            yield line, event if sound else None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return the events of a metrics.jsonl, torn lines left out; none where there is no file.

    Raises:
        CheckpointError: a newer primechat wrote it.
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
    """Return the settings that a run froze.

    Raises:
        ConfigError: they are missing or damaged.
    """
    path = folder / "config.json"
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); restore it, or start under another tag."
        ) from error
    if isinstance(data, dict) and "corpus" in data:
        data.setdefault("corpus_separator", "none")  # a run from before there were marks goes on so
    return decode_config(data, kind, str(path))


def recall_separator(config: Config, folder: Path) -> Config:
    """Return a config that is to be resumed with the mark between documents that its run was started with."""
    if not isinstance(config, (PretrainConfig, DistillConfig)) or not config.resume:
        return config
    if config.corpus_separator != "auto" or not (folder / "config.json").exists():
        return config
    return replace(config, corpus_separator=read_frozen(folder, type(config)).corpus_separator)


def take_frozen(config: Any, folder: Path) -> Any:
    """Return the settings that a run froze, once it is sure that the given ones do not contradict them.

    Raises:
        ConfigError: a field differs, by name.
    """
    frozen = read_frozen(folder, type(config))
    given = replace(
        recall_separator(config, folder),
        runtime=fill_open(config.runtime, frozen.runtime),
        eval=fill_open(config.eval, frozen.eval),
    )
    ignore = (
        *(OPEN_FIELDS if not config.steps else OPEN_FIELDS[:1]),
        *TEXT,
        *(f"runtime.{n}" for n in BUDGET),
    )
    difference = find_difference(frozen, given, ignore)
    if difference:
        rule = "a resumed run must keep its settings; drop that flag, or start under another tag"
        raise ConfigError(f"{difference} (the run's, then yours): {rule}.")
    budget = {name: getattr(given.runtime, name) for name in BUDGET}
    if hasattr(config, "corpus"):
        frozen = replace(frozen, corpus=config.corpus)
    return replace(frozen, resume=True, runtime=replace(frozen.runtime, **budget))


def fill_open(given: Any, frozen: Any) -> Any:
    """Return the given settings with the frozen ones where they were left open: auto or 0, but -1 where 0
    stands for all.
    """
    names = [
        item.name
        for item in dataclasses.fields(given)
        if getattr(given, item.name) in ((-1,) if item.name in WHOLE_AT_0 else ("auto", 0))
    ]
    kept = {n: getattr(frozen, n) for n in names if not isinstance(getattr(given, n), bool)}
    return replace(given, **kept)

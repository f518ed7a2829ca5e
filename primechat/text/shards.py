"""Shards of the large corpora, downloaded from the Hugging Face Hub into a folder.

A complete shard is not downloaded again; with a network, its size is compared with the Hub's. Without a
network, missing shards are reported within 5 s. A feed keeps downloading while training runs.
Reference: names and folders of nanochat's dataset.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from primechat.errors import DataError, HubError
from primechat.events import NoteEvent, OnEvent
from primechat.files.hub import HubFile, ask_hub, explain, fetch_files

# corpus: (repository, folder in the base directory, number of the last shard, used for validation)
HUB_CORPORA = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", "base_data", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6542),
}
PATIENCE_S = 1800.0  # how long training waits for a missing shard
RETRY_S, POLL_S = 20.0, 0.2
AT_ONCE = 4  # shards downloaded in parallel


def list_shards(corpus: str, split: str, n_shards: int) -> list[str]:
    """Return the file names of a split: the first `n_shards` for train, the last shard for val."""
    last = HUB_CORPORA[corpus][2]
    if split == "val":
        return [f"shard_{last:05d}.parquet"]
    if not 1 <= n_shards <= last:
        raise DataError(
            f"n_shards={n_shards} must be from 1 to {last}, all shards of {corpus} but the last; try 8."
        )
    return [f"shard_{i:05d}.parquet" for i in range(n_shards)]


def shard_paths(
    corpus: str,
    split: str,
    n_shards: int,
    on_event: OnEvent | None = None,
    *,
    base_dir: Path | None,
) -> list[Path]:
    """Return the local paths of a split's shards, downloading missing ones into `base_dir`.

    Raises:
        DataError: No `base_dir` is given.
        HubError: A shard is missing and cannot be downloaded.
    """
    if base_dir is None:
        raise DataError(
            f"corpus={corpus!r} needs base_dir, the folder to keep its shards in; give $NANOCHAT_BASE_DIR."
        )
    repo, subfolder, _ = HUB_CORPORA[corpus]
    names = list_shards(corpus, split, n_shards)
    folder = Path(base_dir) / subfolder

    # Compare what is here with the Hub.
    missing = [name for name in names if not (folder / name).is_file()]
    sizes: dict[str, int] = {}
    try:
        sizes = ask_hub(lambda: probe_sizes(repo, names))
    except Exception as error:
        reason, _ = explain(error)
    if missing and not sizes:
        raise HubError(
            f"{missing[0]} and {len(missing) - 1} more of {corpus} are not in {folder} and the Hub cannot "
            f"be asked ({reason}); check the network, or train on chitchat, which needs none."
        )

    # Download what is missing or has another size.
    wanted = [
        HubFile(repo=repo, name=name, path=folder / name, size=sizes[name], repo_type="dataset")
        for name in names
        if sizes and (name in missing or (folder / name).stat().st_size != sizes[name])
    ]
    if wanted:
        fetch_files(wanted, folder / ".download", on_event or (lambda _: None))
    return [folder / name for name in names]


def probe_sizes(repo: str, names: list[str]) -> dict[str, int]:
    """Return the sizes in bytes of files in a repository of the Hub, from one request."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    found = api.get_paths_info(repo, names, repo_type="dataset")
    sizes = {item.path: int(getattr(item, "size", 0)) for item in found}
    for name in names:
        if not sizes.get(name):
            raise HubError(f"{repo} has no file {name} on the Hub; ask for fewer shards.")
    return sizes


class ShardFeed:
    """Shards in reading order; missing ones are downloaded in the background, or waited for."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        repo: str = "",
        keep: int = 0,
        on_event: OnEvent | None = None,
    ) -> None:
        """Create a feed; nothing is downloaded before `begin`.

        Args:
            names: Files in reading order; the first follows the last.
            folder: Folder of the files.
            repo: Repository to download from; empty if another process on this machine downloads.
            keep: Most shards on disk at a time, 0 for all; others are removed once released.
            on_event: Called with a note when a shard has to be waited for.
        """
        self.names, self.folder, self.repo, self.keep = list(names), folder, repo, keep
        self.emit, self.reason = on_event or (lambda event: None), ""
        self.position, self.closed = 0, threading.Event()
        self.thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self.names)

    def begin(self, shard: int) -> None:
        """Set the shard to read first and start downloading from there."""
        self.position = shard
        if self.repo and self.thread is None:
            self.thread = threading.Thread(
                target=self._fetch_all, name="primechat-feed", daemon=True
            )
            self.thread.start()

    def wait(self, shard: int, stop: threading.Event | None = None) -> Path:
        """Return the path of a shard as soon as it exists.

        Args:
            shard: Index of the shard.
            stop: Ends the waiting when set.

        Raises:
            HubError: The shard does not arrive within `PATIENCE_S` seconds.
            DataError: The feed is closed or `stop` is set.
        """
        path, t_start = self.folder / self.names[shard], time.monotonic()
        told = False
        while not path.is_file():
            waited_s = time.monotonic() - t_start
            if self.closed.is_set() or (stop is not None and stop.is_set()):
                raise DataError("these shards are closed; open them again.")
            if waited_s > PATIENCE_S:
                reason = f" ({self.reason})" if self.reason else ""
                raise HubError(
                    f"{path.name} did not come in {waited_s / 60:.0f} minutes{reason}; check the network and "
                    "resume."
                )
            if waited_s > 5 and not told:
                self.emit(NoteEvent(text=f"Waiting for {path.name}. {self.reason}".strip()))
                told = True
            self.closed.wait(POLL_S)
        return path

    def release(self, shard: int) -> None:
        """Declare the shards before `shard` finished: they may be removed, and later ones downloaded."""
        self.position = shard
        if self.keep and self.repo:
            inside = {self.names[i] for i in self._window()}
            for name in set(self.names) - inside:
                (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop downloading; a download in progress is left to its thread."""
        self.closed.set()

    def _window(self) -> list[int]:
        """Return the indices of the shards that may be on disk, in reading order."""
        n = len(self.names)
        return [(self.position + i) % n for i in range(min(n, self.keep or n))]

    def _fetch_all(self) -> None:
        """Download missing shards, nearest first, until closed; a failure is kept in `reason` and retried."""
        sizes: dict[str, int] = {}
        while not self.closed.is_set():
            missing = [i for i in self._window() if not (self.folder / self.names[i]).is_file()][
                :AT_ONCE
            ]
            try:
                if missing:
                    names = [self.names[i] for i in missing]
                    if not set(names) <= set(sizes):
                        sizes |= ask_hub(partial(probe_sizes, self.repo, names))
                    wanted = [
                        HubFile(
                            repo=self.repo,
                            name=n,
                            path=self.folder / n,
                            size=sizes[n],
                            repo_type="dataset",
                        )
                        for n in names
                    ]
                    fetch_files(wanted, self.folder / ".download", lambda _: None, at_once=AT_ONCE)
                    self.reason = ""
                self.closed.wait(POLL_S if missing else 1.0)
            except Exception as error:  # whatever it is, training can use the shards that are here
                self.reason = str(error) if isinstance(error, HubError) else explain(error)[0]
                self.closed.wait(RETRY_S)


def open_feed(
    corpus: str,
    n_shards: int,
    base_dir: Path,
    *,
    fetches: bool,
    keep: int = 0,
    on_event: OnEvent | None = None,
) -> ShardFeed:
    """Return the feed of a corpus's training shards.

    Args:
        corpus: A key of HUB_CORPORA.
        n_shards: Number of training shards.
        base_dir: Base directory, see `shard_paths`.
        fetches: Whether this process downloads; one process per machine does.
        keep: Most shards on disk at a time, 0 for all.
        on_event: Called with a note when a shard has to be waited for.
    """
    repo, subfolder, _ = HUB_CORPORA[corpus]
    return ShardFeed(
        list_shards(corpus, "train", n_shards),
        Path(base_dir) / subfolder,
        repo=repo if fetches else "",
        keep=keep,
        on_event=on_event,
    )

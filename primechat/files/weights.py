"""Reading .pt and .json files that anyone may have made.

Hides: that nothing is believed. A file is inspected without torch first (`primechat.files.archives`), so it
can neither run code nor claim more memory than it has bytes. Torch is imported to read tensors only.
Reference: torch.load with weights_only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from primechat.errors import CheckpointError
from primechat.files.archives import FLOATS, TensorSpec, cut_reason, inspect_tensors
from primechat.files.paths import parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 16 * 2**20
MIN_MAPPED_BYTES = (
    16 * 2**20
)  # of a file's pages, or a sixteenth of it, are held while tensors are cast
MERGED = (
    "c_q.weight",
    "c_k.weight",
    "c_v.weight",
)  # GPT.from_state copies them: not from mapped pages


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 16 MB.

    Raises:
        CheckpointError: missing, too large, not JSON, or not an object.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, too many for settings; restore it.")
        data = parse_json(path.read_bytes())
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read ({e.strerror}); restore it from a backup."
        ) from None
    except ValueError as e:
        raise CheckpointError(
            f"{path} is not JSON ({e!s:.80}); restore it from a backup."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, it must hold an object; restore it."
        )
    return data


def inspect_archive(path: Path) -> Any:
    """Return what a .pt file holds, with a `TensorSpec` in place of each tensor, without torch.

    Raises:
        CheckpointError: it is damaged, wants to call something, or claims more bytes than it has.
    """
    try:
        return inspect_tensors(path)
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read ({e.strerror}); restore it from a backup."
        ) from None
    except ValueError as e:
        raise CheckpointError(
            f"{path} is no sound weight file ({e}); fetch or save it again."
        ) from None


def load_tensors(path: Path) -> Any:
    """Return what an inspected .pt file holds, its tensors mapped from the file, on the CPU.

    Raises:
        CheckpointError: as `inspect_archive`, or torch refuses it.
    """
    inspect_archive(path)
    return read_mapped(path)


def read_mapped(path: Path) -> Any:
    """Return what torch reads from a file that was inspected before."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises whatever a damaged file makes it stumble over
        raise CheckpointError(
            f"{path} is refused by torch ({cut_reason(e)}); fetch or save it again."
        ) from None


def inspect_model(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a model file by name, `_orig_mod.` removed, without torch.

    Raises:
        CheckpointError: as `inspect_archive`, or it is no flat dictionary of floating-point tensors.
    """
    value = inspect_archive(path)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds no dictionary of tensors; it is not a nanochat model.")
    specs: dict[str, TensorSpec] = {}
    for key, spec in value.items():
        name = str(key).removeprefix("_orig_mod.")
        if (
            not isinstance(key, str)
            or not isinstance(spec, TensorSpec)
            or spec.dtype not in FLOATS.values()
        ):
            raise CheckpointError(
                f"{path}: {name[:80]!r} is no floating-point tensor; give another model."
            )
        if name in specs:
            raise CheckpointError(
                f"{path} holds {name!r} twice, with and without _orig_mod.; save it again."
            )
        specs[name] = spec
    return specs


def load_model(path: Path, specs: dict[str, TensorSpec], dtype: str = "") -> dict[str, Tensor]:
    """Return the tensors of a model file by name, `_orig_mod.` removed.

    Args:
        dtype: float32 or bfloat16 to cast to; most tensors that have it already, and all where it is empty,
            stay mapped from the file, but for those of float64, which no model computes in: they become
            float32. Of what is copied, the file's pages are let go: at most a sixteenth
            of the file, 16 MB or one tensor of them are in memory at a time.

    Raises:
        CheckpointError: torch refuses it, or reads other shapes than were inspected.
    """
    import torch

    tensors, cast, mapped = map_model(path, specs), {}, 0
    most = max(MIN_MAPPED_BYTES, path.stat().st_size // 16)
    todo = [
        key
        for key, spec in specs.items()
        if spec.dtype == "float64" or (dtype and (spec.dtype != dtype or key.endswith(MERGED)))
    ]
    for key in sorted(
        todo, key=lambda key: -tensors[key].nbytes
    ):  # the largest while little else is there
        n_bytes = tensors[key].nbytes
        if mapped and mapped + n_bytes > most:
            tensors, mapped = (
                map_model(path, specs),
                0,
            )  # the pages read so far go with the old mapping
        cast[key] = tensors[key].to(getattr(torch, dtype or "float32"), copy=True)
        mapped += n_bytes
    return {**(map_model(path, specs) if cast else tensors), **cast}


def map_model(path: Path, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors of an inspected model file by name, mapped from it."""
    tensors = {
        key.removeprefix("_orig_mod."): tensor for key, tensor in dict(read_mapped(path)).items()
    }
    found = {key: (tuple(t.shape), str(t.dtype)) for key, t in tensors.items()}
    if found != {key: (spec.shape, f"torch.{spec.dtype}") for key, spec in specs.items()}:
        raise CheckpointError(
            f"{path} reads differently to torch than to its inspection; fetch it again."
        )
    return tensors

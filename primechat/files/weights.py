"""Readers of untrusted .pt and .json files.

A .pt file is first inspected without torch (`primechat.files.archives`), so it can neither run code nor claim
more memory than it has bytes. Torch is imported only to read tensors.
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
# While tensors are cast, at most this much of the file stays in memory, or a sixteenth of it if that is more.
MIN_MAPPED_BYTES = 16 * 2**20
# GPT.from_state copies these, so they are read into memory instead of staying mapped.
MERGED = (
    "c_q.weight",
    "c_k.weight",
    "c_v.weight",
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 16 MB.

    Raises:
        CheckpointError: The file is missing, too large, not JSON, or not an object.
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
    """Return the value in a .pt file without torch, with a `TensorSpec` in place of each tensor.

    Raises:
        CheckpointError: The file is unreadable or damaged, calls functions, or claims more bytes than it has.
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
    """Return the value in a .pt file after inspecting it, with its tensors memory-mapped on the CPU.

    Raises:
        CheckpointError: The file fails `inspect_archive`, or torch refuses it.
    """
    inspect_archive(path)
    return read_mapped(path)


def read_mapped(path: Path) -> Any:
    """Return the value that torch reads, memory-mapped, from a file that has been inspected."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged file may make torch raise anything
        raise CheckpointError(
            f"{path} is refused by torch ({cut_reason(e)}); fetch or save it again."
        ) from None


def inspect_model(path: Path) -> dict[str, TensorSpec]:
    """Return the specs of the tensors in a model file by name, with `_orig_mod.` removed, without torch.

    Raises:
        CheckpointError: The file fails `inspect_archive`, or is not a flat dict of floating-point tensors.
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


def load_state(path: Path, specs: dict[str, TensorSpec], dtype: str = "") -> dict[str, Tensor]:
    """Return the tensors of a model file by name, with `_orig_mod.` removed.

    Tensors that need no cast stay memory-mapped, except those of MERGED when a dtype is given. While others
    are copied, the pages of the file are released: at most a sixteenth of the file, 16 MB or one tensor,
    whichever is largest, is in memory at a time.

    Args:
        path: Model file.
        specs: Result of `inspect_model` for this file.
        dtype: float32 or bfloat16 to cast all tensors to. Empty keeps their dtypes, except that float64, in
            which no model computes, becomes float32.

    Raises:
        CheckpointError: Torch refuses the file, or reads other shapes than the inspection did.
    """
    import torch

    tensors, cast, mapped = map_model(path, specs), {}, 0
    most = max(MIN_MAPPED_BYTES, path.stat().st_size // 16)
    todo = [
        key
        for key, spec in specs.items()
        if spec.dtype == "float64" or (dtype and (spec.dtype != dtype or key.endswith(MERGED)))
    ]

    # Cast the largest first, while little else is in memory.
    for key in sorted(todo, key=lambda key: -tensors[key].nbytes):
        n_bytes = tensors[key].nbytes
        if mapped and mapped + n_bytes > most:
            # A new mapping releases the pages that were read through the old one.
            tensors, mapped = map_model(path, specs), 0
        cast[key] = tensors[key].to(getattr(torch, dtype or "float32"), copy=True)
        mapped += n_bytes

    return {**(map_model(path, specs) if cast else tensors), **cast}


def map_model(path: Path, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of an inspected model file by name.

    Raises:
        CheckpointError: Torch refuses the file, or reads other shapes than the inspection did.
    """
    tensors = {
        key.removeprefix("_orig_mod."): tensor for key, tensor in dict(read_mapped(path)).items()
    }
    found = {key: (tuple(t.shape), str(t.dtype)) for key, t in tensors.items()}
    if found != {key: (spec.shape, f"torch.{spec.dtype}") for key, spec in specs.items()}:
        raise CheckpointError(
            f"{path} reads differently to torch than to its inspection; fetch it again."
        )
    return tensors

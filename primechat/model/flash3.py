"""FlashAttention-3, where it can run: on Hopper GPUs, with 16-bit numbers.

Reference: Shah et al. 2024.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

problems: list[str] = []  # why it did not load on a GPU that could run it


@functools.cache
def load_flash3() -> Any:
    """Return the module of FlashAttention-3, or None.

    `flash_attn_interface` is used if it is installed, else the prebuilt kernel that the package `kernels`
    fetches. If that fails, the reason is added to `problems`.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        pass
    try:
        kernels = importlib.import_module("kernels")
        return kernels.get_kernel("kernels-community/flash-attn3", version=1)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        problems.append(f"{type(error).__name__}: {error}")
        return None


def flash3_runs(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether FlashAttention-3 accepts tensors of this device and dtype."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device_type == "cuda" and is_half and load_flash3() is not None

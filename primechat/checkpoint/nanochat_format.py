"""Detection of the nanochat version that wrote a checkpoint: classic, modern, or an unsupported one between.

The architecture is inferred from keys and shapes, because nanochat's metadata does not name it. Its numerics
changed between October 2025 (classic) and mid-2026 (modern) without a trace in the metadata: a checkpoint
from in between could load and be silently wrong, so it is refused.
Reference: nanochat's code of October 2025 and of July 2026.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from primechat.config import GPTConfig, decode_config
from primechat.config.model import (
    GATE_CHANNELS,
    MOST,
    classic_switches,
    list_shapes,
    modern_switches,
)
from primechat.errors import CheckpointError, ConfigError

SHAPE_KEYS = tuple(MOST)
# Size limit of the rotary table, which has 10 * sequence_len rows of head_dim numbers.
MAX_TABLE_BYTES = 2**30
MODERN_KEYS = (
    "resid_lambdas",
    "x0_lambdas",
    "smear_gate",
    "smear_lambda",
    "backout_lambda",
    "value_embeds",
    "ve_gate",
)
Shapes = Mapping[str, tuple[int, ...]]


def encode_model(config: GPTConfig) -> dict[str, Any]:
    """Return a config as metadata: the `model_config` that nanochat's loader reads, and our `gpt_config`."""
    names = (*SHAPE_KEYS, "window_pattern") if config.window_pattern else SHAPE_KEYS
    return {
        "architecture": config.architecture,
        "model_config": {name: getattr(config, name) for name in names},
        "gpt_config": dataclasses.asdict(config),
    }


def read_shape(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the six sizes in a checkpoint's metadata after checking their bounds.

    Raises:
        CheckpointError: A size is missing, not a whole number, or absurd.
    """
    shape = meta.get("model_config")
    if not isinstance(shape, dict):
        raise refuse_meta("has no model_config, which nanochat always writes")
    for name in SHAPE_KEYS:
        value = shape.get(name)
        if type(value) is not int or not 1 <= value <= MOST[name]:
            rule = f"must be a whole number from 1 to {MOST[name]:,}"
            raise refuse_meta(f"says model_config.{name}={str(value)[:40]}, which {rule}")
    table = 40 * shape["sequence_len"] * shape["n_embd"] // shape["n_head"]
    if table > MAX_TABLE_BYTES:
        raise refuse_meta(
            f"implies a rotary table of {table:,} bytes, at most {MAX_TABLE_BYTES:,} may be"
        )
    return {name: shape[name] for name in SHAPE_KEYS}


def read_config(meta: Mapping[str, Any]) -> GPTConfig | None:
    """Return the full config of a checkpoint written by primechat, or None for one written by nanochat.

    Raises:
        CheckpointError: A size is absurd, or two parts of the metadata contradict each other.
    """
    sizes = read_shape(meta)
    if "gpt_config" not in meta:
        return None
    try:
        config = decode_config(meta["gpt_config"], GPTConfig, "gpt_config")
    except (ConfigError, TypeError) as e:
        raise refuse_meta(f"is unusable ({e})") from None
    other = [name for name, value in sizes.items() if getattr(config, name) != value]
    if other:
        raise refuse_meta(f"gives another {name_some(other)} in model_config than in gpt_config")
    return config


def detect_era(shapes: Shapes, meta: Mapping[str, Any]) -> GPTConfig:
    """Return the complete config of a checkpoint.

    Args:
        shapes: Shapes of its tensors, by name.
        meta: Its metadata.

    Raises:
        CheckpointError: It is from an unsupported version, or its tensors do not match its metadata.
    """
    config = read_config(meta)
    if config is None:
        config = guess_config(shapes, meta)

    # The tensors must be exactly those of the config.
    expected = list_shapes(config)
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or extra:
        raise CheckpointError(
            f"A {config.architecture} model of n_layer={config.n_layer} has other tensors: the weights lack "
            f"{name_some(missing)} and have {name_some(extra)} besides; fetch model and meta file again."
        )
    for key, shape in expected.items():
        if tuple(shapes[key]) != shape:
            raise CheckpointError(
                f"The weights hold {key} of shape {tuple(shapes[key])}, the metadata asks for {shape}; "
                "fetch the model and its meta file again."
            )
    return config


def guess_config(shapes: Shapes, meta: Mapping[str, Any]) -> GPTConfig:
    """Return the config of a checkpoint written by nanochat.

    Raises:
        CheckpointError: It is from a version between classic and modern.
    """
    # A modern checkpoint has tensors of all MODERN_KEYS, a classic one has none.
    sizes, has = (
        read_shape(meta),
        {mark for mark in MODERN_KEYS if any(mark in key for key in shapes)},
    )

    # Signs of a version in between.
    window = meta["model_config"].get("window_pattern")
    lm_rows = (shapes.get("lm_head.weight") or (0,))[0]
    padded = -(-sizes["vocab_size"] // 64) * 64
    gates = {shape[-1] for key, shape in shapes.items() if "ve_gate" in key and shape}
    odd = ""
    if not has and window is not None:
        odd = "a window_pattern in its metadata"
    elif not has and lm_rows == padded != sizes["vocab_size"]:
        odd = f"a vocabulary padded to {padded} rows"
    elif len(has) == len(MODERN_KEYS) and gates != {GATE_CHANNELS}:
        widths = name_some(str(n) for n in gates)
        odd = f"value-embedding gates of {widths} channels instead of {GATE_CHANNELS}"
    if odd or 0 < len(has) < len(MODERN_KEYS):
        found = [odd] if odd else []
        raise CheckpointError(
            "These weights are of an era of nanochat between October 2025 (classic) and mid-2026 (modern): "
            f"they have {name_some([*found, *has], 9)}, they lack {name_some(set(MODERN_KEYS) - has, 9)}; "
            "the formulas are not recorded, so use a classic or a modern checkpoint."
        )

    switches: dict[str, Any] = modern_switches() if has else classic_switches()
    if has:
        switches["window_pattern"] = "L" if window is None else str(window).upper()
    try:
        return GPTConfig(**sizes, **switches)
    except ConfigError as e:
        raise refuse_meta(f"is unusable ({e})") from None


def refuse_meta(fault: str) -> CheckpointError:
    """Return the error for a checkpoint with invalid metadata."""
    return CheckpointError(f"Its metadata {fault}; restore the meta file.")


def name_some(names: Iterable[str], most: int = 4) -> str:
    """Return the first `most` names as text, followed by the number of further names."""
    ordered = sorted(names)
    shown = [ascii(name[:60])[1:-1] for name in ordered[:most]]
    more = [f"{len(ordered) - most} more"] if len(ordered) > most else []
    return ", ".join(shown + more) or "nothing"

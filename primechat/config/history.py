"""Translation of old settings files, so that old runs resume exactly as they trained.

There are two tables. `RENAMED` lists fields that have been renamed. `SCHEMA_1` lists the fields that a
config.json of schema 1 does not contain: each takes the value that reproduces what the code computed at that
time, whatever the defaults are today.
"""

from __future__ import annotations

from typing import Any

# Config class: {old name of a field: current name}.
RENAMED = {
    "AutochatConfig": {"n_talks": "n_conversations"},
    "EvalConfig": {
        "eval_every": "every",
        "eval_tokens": "tokens",
        "last_eval_tokens": "last_tokens",
    },
    **dict.fromkeys(
        ("PretrainConfig", "FinetuneConfig", "LoRAConfig", "DistillConfig"), {"look": "eval"}
    ),
}

SCALAR_FACTOR = (
    0.01  # schema 1 had one `scalar_lr`, and every learned scalar used a hundredth of it
)
SCALAR_RATES = ("residual_lr", "x0_lr", "smear_lr")

SCHEMA_1: dict[str, dict[str, Any]] = {
    "OptimConfig": {
        "value_embedding_ratio": 1.0,
        "adam_beta1": 0.8,
        "x0_beta1": 0.8,
        "adam_beta2": 0.95,
        "embedding_beta2": 0.95,
        "unembedding_beta2": 0.95,
        "adam_eps": 1e-10,
        "embedding_decay": 0.0,
        "value_embedding_decay": 0.0,
        "unembedding_decay": 0.0,
        "residual_decay": 0.0,
        "cautious_decay": False,
        "decay_schedule": "rate",
        "orthogonalize": "polar-damped",
        "equalize_rows": False,
        "restore_norm": False,
        "row_beta2": 0.95,
        "momentum_start": 0.85,
        "momentum_steps": 300,
        "momentum_share": 0.25,
        "momentum_end": 0.0,
        "warmup_steps": 0,
        "whole_steps": False,
    },
    "PretrainConfig": {
        "params_counted": "all",
        "rows": "stream",
        "init": {
            "embedding_std": 0.8,
            "head_std": 0.001,
            "matrices": "uniform",
            "mlp_gain": 1.0,
            "residual_first": 1.0,
            "residual_last": 1.0,
            "x0_first": 0.1,
            "x0_last": 0.1,
            "backout": 0.2,
            "gate_max": 0.0,
        },
    },
}


def rename_fields(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the settings under their current names.

    Args:
        data: one object of the file, as JSON gives it.
        kind: name of the config class.

    >>> rename_fields({"eval_every": 4}, "EvalConfig")
    {'every': 4}
    """
    new_names = RENAMED.get(kind, {})
    return {new_names.get(name, name): value for name, value in data.items()}


def upgrade_settings(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the settings of a schema 1 file, completed with the fields that did not exist then.

    Args:
        data: one object of the file, as JSON gives it.
        kind: name of the config class.

    >>> upgrade_settings({"scalar_lr": 0.5}, "OptimConfig")["x0_lr"]
    0.005
    """
    new = {**SCHEMA_1.get(kind, {}), **data}
    rate = new.get("scalar_lr")
    if kind == "OptimConfig" and isinstance(rate, (int, float)) and not isinstance(rate, bool):
        del new["scalar_lr"]
        new = {**dict.fromkeys(SCALAR_RATES, rate * SCALAR_FACTOR), **new}
    return new

"""LoRA: low-rank trained matrices beside the frozen ones; a model may have several, each with a scale.

To y = Wx an adapter adds scale * s * B(Ax), with s = alpha / r, or alpha / sqrt(r) for rslora. A (r, in)
starts random and B (out, r) starts at zero, so a new adapter changes nothing. The files are those of PEFT:
adapter_config.json and adapter_model.safetensors.
Reference: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rslora); the package peft for the file format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from primechat.errors import CheckpointError, ConfigError
from primechat.files.paths import make_folder, write_file
from primechat.files.weights import read_json
from primechat.model.gpt import GPT, Linear

TARGETS = ("c_q", "c_k", "c_v", "attn.c_proj", "c_fc", "mlp.c_proj")
PREFIX = "base_model.model."
# Settings of PEFT that would change the result, each with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """The shape of an adapter; a rank of 0 means no adapter."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """The factor s before B(Ax)."""
        return self.alpha / self.rank ** (0.5 if self.rslora else 1.0) if self.rank else 0.0


class Adapter(nn.Module):
    """The adapters of one linear map, each with matrices A (r, in) and B (out, r) and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.factors: dict[str, float] = {}  # s, fixed when the adapter is trained
        self.scales: dict[str, float] = {}  # chosen by the user: 0 is off, 1 is as trained
        self.dropout = 0.0

    def active(self) -> list[tuple[Tensor, Tensor, float]]:
        """Return A, B and s * scale of each adapter whose scale is not 0."""
        return [
            (self.a[n], self.b[n], self.factors[n] * self.scales[n])
            for n in self.factors
            if self.scales[n]
        ]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., out) plus what the adapters compute from x (..., in)."""
        for a, b, factor in self.active():
            seen = x
            # Dropout draws from torch's global generator, whose state a checkpoint keeps.
            if self.training and self.dropout and a.requires_grad:
                seen = F.dropout(x, self.dropout)
            low = F.linear(seen, a.to(x.dtype))  # (..., r)
            y = y + F.linear(low, b.to(x.dtype)) * factor
        return y

    def make_whole(self, weight: Tensor) -> Tensor:
        """Return W + dW (out, in) in the dtype of W, or W itself if no adapter is active."""
        change = self.change()
        return weight if change is None else (weight.float() + change).to(weight.dtype)

    def change(self) -> Tensor | None:
        """Return dW (out, in) in float32, the sum over the active adapters, or None if there is none."""
        parts = [factor * (b.float() @ a.float()) for a, b, factor in self.active()]
        return torch.stack(parts).sum(0) if parts else None


def list_targets(model: GPT, targets: tuple[str, ...] = TARGETS) -> dict[str, Linear]:
    """Return the linear maps that the targets name, keyed by their path in the model.

    Raises:
        ConfigError: a target is not in TARGETS, or there is none.
    """
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        raise ConfigError(
            f"targets={list(targets)!r} must be some of {', '.join(TARGETS)}; leave out {unknown or 'none'}."
        )
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear) and any(f".{path}".endswith(f".{t}") for t in targets)
    }


def attach(
    model: GPT,
    name: str,
    spec: LoraSpec,
    *,
    generator: torch.Generator | None = None,
    train: bool = False,
) -> list[nn.Parameter]:
    """Attach a new adapter to the targets and return its parameters.

    The outputs of the model stay exactly the same until the adapter is trained.

    Args:
        model: the model to adapt.
        name: name of the adapter, without dots.
        spec: its shape.
        generator: draws A uniformly from -1 / sqrt(in) to 1 / sqrt(in), as PEFT does.
        train: freeze all other parameters and make the adapter trainable.

    Returns:
        The parameters of the adapter.
    """
    maps, params = list_targets(model, spec.targets), []
    if train:
        model.requires_grad_(False)
    for linear in maps.values() if spec.rank else ():
        if linear.adapter is None:
            linear.adapter = Adapter().train(model.training)

        # A is random and B is zero.
        kind: dict[str, Any] = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        bound = linear.in_features**-0.5
        drawn = torch.empty(spec.rank, linear.in_features).uniform_(
            -bound, bound, generator=generator
        )
        a = nn.Parameter(drawn.to(**kind), requires_grad=train)
        b = nn.Parameter(torch.zeros(linear.out_features, spec.rank, **kind), requires_grad=train)

        linear.adapter.a[name], linear.adapter.b[name] = a, b
        linear.adapter.factors[name], linear.adapter.scales[name] = spec.scale, 1.0
        linear.adapter.dropout = spec.dropout
        params += [a, b]
    model.forget_token_weights()
    return params


def detach(model: GPT, name: str) -> None:
    """Remove an adapter from a model."""
    for linear in list_targets(model).values():
        drop_adapter(linear, name)
    model.forget_token_weights()


def drop_adapter(linear: Linear, name: str) -> None:
    """Remove an adapter from one linear map, if it is there."""
    adapter = linear.adapter
    if adapter is not None and name in adapter.factors:
        for part in (adapter.a, adapter.b, adapter.factors, adapter.scales):
            del part[name]
        linear.adapter = adapter if adapter.factors else None


def list_adapters(model: GPT) -> dict[str, float]:
    """Return the names of a model's adapters and their scales."""
    found: dict[str, float] = {}
    for linear in list_targets(model).values():
        found |= linear.adapter.scales if linear.adapter is not None else {}
    return found


def set_adapter_scale(model: GPT, name: str, scale: float) -> None:
    """Set the scale of an adapter: 0 is exactly off, 1 is as trained, and up to 2 amplifies it.

    Raises:
        ConfigError: the model has no adapter of this name.
    """
    there = list_adapters(model)
    if name not in there:
        raise ConfigError(
            f"adapter={name!r} must be one of this model's ({', '.join(there) or 'none'}); attach it."
        )
    for linear in list_targets(model).values():
        if linear.adapter is not None and name in linear.adapter.scales:
            linear.adapter.scales[name] = float(scale)
    model.forget_token_weights()


@torch.no_grad()
def merge(model: GPT) -> dict[str, Tensor]:
    """Add the active adapters to the weights, set their scales to 0, and return the old weights by path."""
    before: dict[str, Tensor] = {}
    for path, linear in list_targets(model).items():
        change = linear.adapter.change() if linear.adapter is not None else None
        if change is not None:
            before[path] = linear.weight.detach().clone()
            linear.weight.copy_(linear.weight.float() + change)
    for name in list_adapters(model):
        set_adapter_scale(model, name, 0.0)
    return before


def weight_changes(model: GPT) -> dict[str, Tensor]:
    """Return dW (out, in) of each adapted map, in float32, keyed by path."""
    found = {p: m.adapter.change() for p, m in list_targets(model).items() if m.adapter is not None}
    return {path: change for path, change in found.items() if change is not None}


# ---- files


def read_state(model: GPT, name: str) -> dict[str, Tensor]:
    """Return an adapter's matrices under PEFT's keys."""
    state = {}
    for path, linear in list_targets(model).items():
        if linear.adapter is not None and name in linear.adapter.factors:
            state[f"{PREFIX}{path}.lora_A.weight"] = linear.adapter.a[name].detach()
            state[f"{PREFIX}{path}.lora_B.weight"] = linear.adapter.b[name].detach()
    return state


def save_adapter(
    model: GPT, name: str, spec: LoraSpec, folder: Path | str, base: str = "", **labels: str
) -> None:
    """Write an adapter as PEFT's two files.

    Args:
        base: the model that it was trained on, for adapter_config.json.
        labels: further facts about its origin, for the header of the safetensors file.
    """
    from safetensors.torch import save

    folder = make_folder(Path(folder))
    state = {
        key: tensor.float().cpu().contiguous() for key, tensor in read_state(model, name).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_file(
        folder / "adapter_model.safetensors", save(state, metadata={"format": "pt", **labels})
    )
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2))


def open_adapter(
    model: GPT, name: str, folder: Path, tokenizer_identity: str, scale: float = 1.0
) -> None:
    """Attach the adapter in a folder to a model and set its scale.

    Raises:
        CheckpointError: the folder holds no adapter, or one for another model or tokenizer.
    """
    if not folder.is_dir():
        there = sorted(f.name for f in folder.parent.iterdir()) if folder.parent.is_dir() else []
        raise CheckpointError(
            f"{folder} is missing, the adapters are: {', '.join(there[:8]) or 'none'}; name one of those or "
            f"run `primechat lora --tag {name}`."
        )
    load_adapter(model, name, folder)
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        identity = (file.metadata() or {}).get("tokenizer_identity")
    if identity and identity != tokenizer_identity:
        raise CheckpointError(
            f"lora:{name} was trained with the tokenizer {identity[:12]}, this model has "
            f"{tokenizer_identity[:12]}; {name_remedy(name, folder)}."
        )
    set_adapter_scale(model, name, scale)


def read_base(folder: Path | str) -> str:
    """Return the model that an adapter names as its base, or "" if it names none."""
    path = Path(folder) / "adapter_config.json"
    return str(read_json(path).get("base_model_name_or_path") or "") if path.is_file() else ""


def name_remedy(name: str, folder: Path | str) -> str:
    """Return the advice for an adapter that was made for another model, as the end of a message."""
    base = read_base(folder)
    return f"it was made for {base}: use lora:{name}+{base}" if base else "use it with its base"


def load_adapter(model: GPT, name: str, folder: Path | str) -> LoraSpec:
    """Attach an adapter from PEFT's two files, whoever wrote them, and return its shape.

    Raises:
        CheckpointError: a file is missing, damaged or made for another model, or it has a setting that would
            change the result and is not supported here.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file() or not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds no adapter_config.json with {path.name}; copy both.")
    spec = read_spec(folder / "adapter_config.json")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!s:.80}); copy it again.") from None
    put_state(model, name, spec, state, path)
    return spec


def put_state(
    model: GPT, name: str, spec: LoraSpec, state: Mapping[str, Tensor], where: Path
) -> None:
    """Attach an adapter with the matrices read from a file.

    Raises:
        CheckpointError: a linear map, a matrix or a shape does not match the model.
    """
    # The maps that the file adapts must exist in the model.
    paths = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state}
    maps, remedy = list_targets(model), name_remedy(name, where.parent)
    strange = sorted(paths - set(maps)) or ([] if paths else ["nothing"])
    if strange:
        raise CheckpointError(
            f"{where} adapts {strange[0]!r}, which this model has not or does not adapt; {remedy}."
        )

    # All shapes must match. This is checked before any memory is allocated, because a file can claim
    # any rank.
    wanted: dict[str, tuple[int, int]] = {}
    for path in paths & set(list_targets(model, spec.targets)):
        wanted[f"{PREFIX}{path}.lora_A.weight"] = (spec.rank, maps[path].in_features)
        wanted[f"{PREFIX}{path}.lora_B.weight"] = (maps[path].out_features, spec.rank)
    for key in sorted({*wanted, *state}):
        there, needed = tuple(state[key].shape) if key in state else None, wanted.get(key)
        if there != needed:
            raise CheckpointError(
                f"{where} has {key} of shape {there}, this model and rank {spec.rank} need {needed}; "
                f"{remedy}."
            )

    # Attach, and remove the adapter from maps that its targets match but the file does not adapt.
    attach(model, name, spec)
    for path in set(maps) - paths:
        drop_adapter(maps[path], name)
    for key, matrix in read_state(model, name).items():
        matrix.copy_(state[key])


def read_spec(path: Path) -> LoraSpec:
    """Return the shape of the adapter that an adapter_config.json describes.

    Raises:
        CheckpointError: a setting is invalid or not supported here.
    """
    # Refuse settings that would change the result.
    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is of type {data.get('peft_type')!r:.40}, only LORA is read; use another."
        )
    for key, allowed in NEUTRAL.items():
        if data.get(key) not in allowed:
            raise CheckpointError(
                f"{path} sets {key}={data[key]!r:.60}, which is not done here; train without it."
            )

    # Read the numbers within bounds, then the targets.
    alpha: Any = data.get("lora_alpha")
    rank, dropout = data.get("r"), data.get("lora_dropout") or 0
    sound = all(isinstance(n, (int, float)) and abs(n) <= 1e6 for n in (alpha, dropout))
    if not isinstance(rank, int) or not 0 < rank <= 65_536 or not sound:
        said = f"r={rank!r:.20}, lora_alpha={alpha!r:.20} and lora_dropout={dropout!r:.20}"
        raise CheckpointError(f"{path} has {said}; write numbers.")
    if data.get("rank_pattern"):
        raise CheckpointError(
            f"{path} has several ranks (rank_pattern), one is read; train with one."
        )
    named = data.get("target_modules")
    targets = tuple(t for t in TARGETS if isinstance(named, list) and matches(t, named)) or TARGETS
    return LoraSpec(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(data.get("use_rslora")),
        dropout=float(dropout),
        targets=targets,
    )


def matches(target: str, named: list[Any]) -> bool:
    """Return whether any of PEFT's target names matches `target`, by the end of its path or its last part."""
    return any(
        f".{str(n)}".endswith((f".{target}", f".{target.rpartition('.')[2]}")) for n in named
    )

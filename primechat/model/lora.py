"""LoRA: thin trained matrices beside the frozen ones, several on one model, each with a dial.

Hides: where they sit and how they travel. To y = Wx an adapter adds dial * s * B(Ax), A (r, in) random and
B (out, r) zero at first, so that a fresh adapter changes nothing; s = alpha / r, or alpha / sqrt(r) for
rslora. Files are PEFT's: adapter_config.json and adapter_model.safetensors.
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
# what other settings of PEFT would change the result, and the value at which they do not
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
    """The shape of an adapter; a rank of 0 is no adapter at all."""

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
    """What adapters add to one linear map; each has matrices A (r, in), B (out, r) and a dial."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.dials: dict[str, float] = {}
        self.dropout = 0.0

    def active(self) -> list[tuple[Tensor, Tensor, float]]:
        """Return A, B and the whole factor of each adapter that is not dialled to 0."""
        return [
            (self.a[n], self.b[n], self.scales[n] * self.dials[n])
            for n in self.scales
            if self.dials[n]
        ]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., out) with what the adapters make of x (..., in)."""
        for a, b, factor in self.active():
            seen = x
            if self.training and self.dropout and a.requires_grad:
                seen = F.dropout(
                    x, self.dropout
                )  # by torch's own generator: a checkpoint keeps its state
            low = F.linear(seen, a.to(x.dtype))  # (..., r)
            y = y + F.linear(low, b.to(x.dtype)) * factor
        return y

    def make_whole(self, weight: Tensor) -> Tensor:
        """Return W + dW (out, in) in the dtype of W."""
        change = self.change()
        return weight if change is None else (weight.float() + change).to(weight.dtype)

    def change(self) -> Tensor | None:
        """Return dW (out, in) in float32, the sum over the active adapters; None where there is none."""
        parts = [factor * (b.float() @ a.float()) for a, b, factor in self.active()]
        return torch.stack(parts).sum(0) if parts else None


def list_targets(model: GPT, targets: tuple[str, ...] = TARGETS) -> dict[str, Linear]:
    """Return the linear maps of the blocks that the targets name, by their path in the model.

    Raises:
        ConfigError: a target is none of these maps.
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
    """Put a fresh adapter beside the targets; the model computes exactly what it did before.

    Args:
        name: names it among several; no dots.
        generator: draws A, uniform within 1 / sqrt(in), as PEFT does.
        train: freeze everything else, and let the adapter learn.

    Returns:
        Its parameters.
    """
    maps, params = list_targets(model, spec.targets), []
    if train:
        model.requires_grad_(False)
    for linear in maps.values() if spec.rank else ():
        if linear.adapter is None:
            linear.adapter = Adapter().train(model.training)
        kind: dict[str, Any] = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        bound = linear.in_features**-0.5
        drawn = torch.empty(spec.rank, linear.in_features).uniform_(
            -bound, bound, generator=generator
        )
        a = nn.Parameter(drawn.to(**kind), requires_grad=train)
        b = nn.Parameter(torch.zeros(linear.out_features, spec.rank, **kind), requires_grad=train)
        linear.adapter.a[name], linear.adapter.b[name] = a, b
        linear.adapter.scales[name], linear.adapter.dials[name] = spec.scale, 1.0
        linear.adapter.dropout = spec.dropout
        params += [a, b]
    model.forget_token_weights()
    return params


def detach(model: GPT, name: str) -> None:
    """Take an adapter off again."""
    for linear in list_targets(model).values():
        drop_adapter(linear, name)
    model.forget_token_weights()


def drop_adapter(linear: Linear, name: str) -> None:
    """Take an adapter off one map, if it is there."""
    adapter = linear.adapter
    if adapter is not None and name in adapter.scales:
        for part in (adapter.a, adapter.b, adapter.scales, adapter.dials):
            del part[name]
        linear.adapter = adapter if adapter.scales else None


def list_adapters(model: GPT) -> dict[str, float]:
    """Return the adapters of a model, each with its dial."""
    found: dict[str, float] = {}
    for linear in list_targets(model).values():
        found |= linear.adapter.dials if linear.adapter is not None else {}
    return found


def turn_dial(model: GPT, name: str, dial: float) -> None:
    """Scale an adapter from now on: 0 is off, exactly; 1 is as trained; up to 2 is more of it.

    Raises:
        ConfigError: the model has no such adapter.
    """
    there = list_adapters(model)
    if name not in there:
        raise ConfigError(
            f"adapter={name!r} must be one of this model's ({', '.join(there) or 'none'}); attach it."
        )
    for linear in list_targets(model).values():
        if linear.adapter is not None and name in linear.adapter.dials:
            linear.adapter.dials[name] = float(dial)
    model.forget_token_weights()


@torch.no_grad()
def merge(model: GPT) -> dict[str, Tensor]:
    """Add the active adapters to the weights, turn their dials to 0, and return the weights as they were."""
    before: dict[str, Tensor] = {}
    for path, linear in list_targets(model).items():
        change = linear.adapter.change() if linear.adapter is not None else None
        if change is not None:
            before[path] = linear.weight.detach().clone()
            linear.weight.copy_(linear.weight.float() + change)
    for name in list_adapters(model):
        turn_dial(model, name, 0.0)
    return before


def weight_changes(model: GPT) -> dict[str, Tensor]:
    """Return dW (out, in) of each adapted map by its path, in float32."""
    found = {p: m.adapter.change() for p, m in list_targets(model).items() if m.adapter is not None}
    return {path: change for path, change in found.items() if change is not None}


# Files


def read_state(model: GPT, name: str) -> dict[str, Tensor]:
    """Return an adapter's matrices by PEFT's keys."""
    state = {}
    for path, linear in list_targets(model).items():
        if linear.adapter is not None and name in linear.adapter.scales:
            state[f"{PREFIX}{path}.lora_A.weight"] = linear.adapter.a[name].detach()
            state[f"{PREFIX}{path}.lora_B.weight"] = linear.adapter.b[name].detach()
    return state


def save_adapter(
    model: GPT, name: str, spec: LoraSpec, folder: Path | str, base: str = "", **labels: str
) -> None:
    """Write an adapter as PEFT's two files; base and labels (in its header) tell where it is from."""
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
    model: GPT, name: str, folder: Path, tokenizer_identity: str, dial: float = 1.0
) -> None:
    """Put an adapter beside a model, its dial set.

    Raises:
        CheckpointError: there is none, or it was trained for another model or tokenizer.
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
    turn_dial(model, name, dial)


def read_base(folder: Path | str) -> str:
    """Return the model that an adapter says it was trained on; empty where it does not say."""
    path = Path(folder) / "adapter_config.json"
    return str(read_json(path).get("base_model_name_or_path") or "") if path.is_file() else ""


def name_remedy(name: str, folder: Path | str) -> str:
    """Return what to do with an adapter that is not for the model at hand."""
    base = read_base(folder)
    return f"it was made for {base}: use lora:{name}+{base}" if base else "use it with its base"


def load_adapter(model: GPT, name: str, folder: Path | str) -> LoraSpec:
    """Attach an adapter from PEFT's two files, ours or others', and return its shape.

    Raises:
        CheckpointError: a file is missing or damaged, was made for another model, or says something that
            would change the result and is not done here.
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
    """Attach an adapter with the matrices that stood in a file.

    Raises:
        CheckpointError: a map, a matrix or a shape is not this model's.
    """
    paths = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state}
    maps, remedy = list_targets(model), name_remedy(name, where.parent)
    strange = sorted(paths - set(maps)) or ([] if paths else ["nothing"])
    if strange:
        raise CheckpointError(
            f"{where} adapts {strange[0]!r}, which this model has not or does not adapt; {remedy}."
        )
    wanted: dict[str, tuple[int, int]] = {}
    for path in paths & set(list_targets(model, spec.targets)):
        wanted[f"{PREFIX}{path}.lora_A.weight"] = (spec.rank, maps[path].in_features)
        wanted[f"{PREFIX}{path}.lora_B.weight"] = (maps[path].out_features, spec.rank)
    for key in sorted({*wanted, *state}):  # before it takes memory: a rank is easily claimed
        there, needed = tuple(state[key].shape) if key in state else None, wanted.get(key)
        if there != needed:
            raise CheckpointError(
                f"{where} has {key} of shape {there}, this model and rank {spec.rank} need {needed}; "
                f"{remedy}."
            )
    attach(model, name, spec)
    for path in set(maps) - paths:  # a file may adapt fewer maps than its targets match
        drop_adapter(maps[path], name)
    for key, matrix in read_state(model, name).items():
        matrix.copy_(state[key])


def read_spec(path: Path) -> LoraSpec:
    """Return the shape that an adapter_config.json tells."""
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
    """Tell whether PEFT's target names reach one of ours, as whole paths, their ends, or plain names."""
    return any(
        f".{str(n)}".endswith((f".{target}", f".{target.rpartition('.')[2]}")) for n in named
    )

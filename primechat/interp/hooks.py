"""Hooks on a forward pass: named points as numpy arrays, ablated parts, states patched between prompts.

The model's own forward pass is observed, not a second model: reading a point changes no bit of the result.
Points of a prompt of T tokens: token embed last final (T, C); logits (T, V); layer.<i>.resid (T, C);
layer.<i>.attn.q_raw (T, H, D) and .k_raw (T, K, D) before rotation and norm, .q (T, H, D), .k .v (T, K, D),
.weights (H, T, T), .heads (T, H, D), .out (T, C); layer.<i>.mlp.pre (T, 4C), .out (T, C). `last` is the
input of the final norm, `final` its output.
Reference: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.errors import ConfigError
from primechat.interp.anatomy import dissect

PART = re.compile(r"layer\.(\d+)\.(?:head\.(\d+)|attn|mlp)")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Tensors recorded while a model read `ids`.

    `losses[t]` is the loss in nats of ids[t + 1] given the tokens before it; `last` holds the logits (V,)
    after the last token; `points` maps the name of each captured point to its values.
    """

    ids: np.ndarray
    losses: np.ndarray
    last: np.ndarray
    points: dict[str, np.ndarray] = field(repr=False)

    def __getitem__(self, point: str) -> np.ndarray:
        if point not in self.points:
            there = ", ".join(self.points) or "none"
            raise ConfigError(
                f"point={point!r} was not captured (there are: {there}); add it to points=."
            )
        return self.points[point]

    def stack(self, part: str) -> np.ndarray:
        """Return one point of all captured layers as (L, ...); `part` is a name such as attn.weights."""
        names = [
            name for name in self.points if re.fullmatch(rf"layer\.\d+\.{re.escape(part)}", name)
        ]
        if not names:
            raise ConfigError(
                f"part={part!r} was captured in no layer; add 'layer.*.{part}' to points=."
            )
        return np.stack([self.points[name] for name in names])


@dataclass(frozen=True, kw_only=True)
class Patch:
    """States of another pass that replace those of this one.

    They are the `points` (or layer.<i>.head.<h>) at the positions `at`, all if None; `source` must have
    captured them.
    """

    source: Capture
    points: tuple[str, ...]
    at: tuple[int, ...] | None = None


def capture(
    model: Any,
    ids: Sequence[int] | np.ndarray,
    *,
    points: Iterable[str] = (),
    ablate: Iterable[str] = (),
    patch: Patch | None = None,
) -> Capture:
    """Return the tensors at named points of a model's pass over one prompt.

    Args:
        model: a GPT or a foreign model.
        ids: (T,) token ids.
        points: names as listed in the module's docstring; `*` matches any part of a name.
        ablate: parts whose output becomes zero: layer.<i>.head.<h>, layer.<i>.attn, layer.<i>.mlp.
        patch: states of another pass to insert.

    Returns:
        The Capture, without a batch axis, in float32.

    Raises:
        ConfigError: a point or part does not exist, or the ids do not fit the model.
    """
    # Check the request.
    body = dissect(model)
    row = check_ids(body, ids)
    names = list_points(body)
    wanted = [name for pattern in points for name in match_points(pattern, names)]

    # Run the model with a hook that records and changes what was asked for.
    recorder = Recorder(wanted, cut_parts(body, ablate), patch, n_tokens=len(row))
    batch = torch.from_numpy(row).to(body.device)[None]
    with torch.inference_mode():
        logits = body.trace(batch, recorder)[0]
        losses = F.cross_entropy(logits[:-1], batch[0, 1:], reduction="none")
    kept = {name: recorder.kept[name] for name in names if name in recorder.kept}
    return Capture(ids=row, losses=to_numpy(losses), last=to_numpy(logits[-1]), points=kept)


class Recorder:
    """A hook that records the wanted points, zeroes ablated parts and inserts a patch."""

    def __init__(
        self,
        wanted: Iterable[str],
        cuts: dict[str, list[int]],
        patch: Patch | None = None,
        n_tokens: int = 0,
    ) -> None:
        self.wanted, self.cuts, self.kept = frozenset(wanted), cuts, dict[str, np.ndarray]()
        self.puts = lay_patch(patch, n_tokens) if patch else {}

    def wants(self, point: str) -> bool:
        """Return whether a point is recorded."""
        return point in self.wanted

    def __call__(self, point: str, x: Tensor) -> Tensor:
        if point in self.cuts:
            x = x.clone()
            heads = self.cuts[point]
            x[:, :, heads or slice(None)] = 0
        if point in self.puts:
            x = x.clone()
            for where, value in self.puts[point]:
                x[0][where] = torch.from_numpy(value).to(x)
        if point in self.wanted:
            self.kept[point] = to_numpy(x[0])
        return x


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a float32 copy on the CPU."""
    return x.detach().to("cpu", torch.float32, copy=True).numpy()


def check_ids(body: Any, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return ids as int64 (T,).

    Raises:
        ConfigError: there are no ids, too many, or one outside the vocabulary.
    """
    row = np.asarray(ids, dtype=np.int64)
    if row.ndim != 1 or not 0 < len(row) <= body.max_context:
        raise ConfigError(
            f"ids of shape {row.shape} must be one row of 1 to {body.max_context}; shorten it."
        )
    if row.min() < 0 or row.max() >= body.vocab_size:
        worst = int(row.min() if row.min() < 0 else row.max())
        raise ConfigError(
            f"id {worst} must be in 0..{body.vocab_size - 1}; use this model's own tokenizer."
        )
    return row


def list_points(body: Any) -> list[str]:
    """Return the names of all points of a model's forward pass, in its order."""
    layers = [f"layer.{i}.{part}" for i in range(body.n_layer) for part in body.layer_points]
    return ["token", "embed", *layers, "last", "final", "logits"]


def match_points(pattern: str, names: list[str]) -> list[str]:
    """Return the points that match a name or pattern.

    Raises:
        ConfigError: no point matches.
    """
    found = fnmatch.filter(names, pattern)
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
        raise ConfigError(
            f"point={pattern!r} is none of this model's {len(names)} points; try {near!r}."
        )
    return found


def cut_parts(body: Any, parts: Iterable[str]) -> dict[str, list[int]]:
    """Return the heads to zero at each ablated point; an empty list zeroes the whole point."""
    cuts: dict[str, list[int]] = {}
    for part in parts:
        match = PART.fullmatch(part)
        if not match or int(match[1]) >= body.n_layer or int(match[2] or 0) >= body.n_head:
            raise ConfigError(
                f"part={part!r} must be like layer.0.head.0, layer.0.attn or layer.0.mlp, of "
                f"{body.n_layer} layers and {body.n_head} heads; count from 0."
            )
        layer = f"layer.{match[1]}"
        if match[2]:
            cuts.setdefault(f"{layer}.attn.heads", []).append(int(match[2]))
        else:
            cuts[f"{layer}.{part.rpartition('.')[2]}.out"] = []
    return cuts


def lay_patch(patch: Patch, n_tokens: int) -> dict[str, list[tuple[tuple[Any, ...], np.ndarray]]]:
    """Return, for each patched point, the indices (without the batch axis) and the values to insert there."""
    puts: dict[str, list[tuple[tuple[Any, ...], np.ndarray]]] = {}
    n_source = len(patch.source.ids)
    at = list(range(n_tokens)) if patch.at is None else list(patch.at)
    if at and not 0 <= min(at) <= max(at) < min(n_tokens, n_source):
        raise ConfigError(
            f"at={patch.at} must lie in both prompts, of {n_tokens} and {n_source} tokens; make them equal "
            "in length or name places that both have."
        )
    for point in patch.points:
        where: tuple[Any, ...] = (at,)
        if match := re.fullmatch(r"(layer\.\d+)\.head\.(\d+)", point):
            point, where = f"{match[1]}.attn.heads", (at, int(match[2]))
        puts.setdefault(point, []).append((where, patch.source[point][where]))
    return puts

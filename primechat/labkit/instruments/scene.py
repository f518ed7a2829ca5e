"""One model reading one text, looked at from every side; each figure is computed when it is first asked for.

Hides: what a capture costs. Weights of long texts are read a few layers at a time, so that memory stays
below WEIGHT_ROOM. Reference: primechat.interp.hooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from primechat.interp import circuits
from primechat.interp.anatomy import dissect
from primechat.interp.hooks import Capture, capture

SIDE = 32  # a thumbnail's largest number of rows
WEIGHT_ROOM = 2**26  # attention weights held at once


def spell_tokens(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Return the text of each token; half a character is U+FFFD."""
    return [tokenizer.token_bytes(int(i)).decode("utf-8", "replace") for i in ids]


def pool_weights(weights: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Return the largest weight of each tile, (H, S, S) with S of at most `side`, of weights (H, T, T)."""
    n = weights.shape[-1]
    tile = -(-n // side)
    pad = -n % tile
    padded = np.pad(weights, ((0, 0), (0, pad), (0, pad)))
    s = padded.shape[-1] // tile
    return padded.reshape(-1, s, tile, s, tile).max(axis=(2, 4))


class Scene:
    """A model, its tokenizer and a text, (T,) of at least two tokens."""

    def __init__(self, model: Any, tokenizer: Any, ids: np.ndarray) -> None:
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.body = dissect(model)
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0))

    @cached_property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return spell_tokens(self.tokenizer, self.ids)

    @cached_property
    def seen(self) -> Capture:
        """The stream at every stage and what each part wrote into it."""
        return capture(self.model, self.ids, points=[*circuits.STREAM, *circuits.READABLE])

    @cached_property
    def loss(self) -> float:
        """Mean nats a token."""
        return float(self.seen.losses.mean())

    @cached_property
    def lens(self) -> circuits.Lens:
        """The logit lens, three guesses a cell."""
        return circuits.read_lens(self.model, self.seen)

    @cached_property
    def lens_table(self) -> dict[str, Any]:
        """The lens as a view takes it: tokens, stages in words, and cells (stages, T) of three guesses."""
        lens = self.lens
        ids = np.unique(lens.ids)
        known = dict(zip(ids.tolist(), spell_tokens(self.tokenizer, ids), strict=True))
        cells = [
            [
                {
                    "top": [[known[int(i)], float(p)] for i, p in zip(ids, probs, strict=True)],
                    "target": float(target),
                    "bits": float(bits),
                }
                for ids, probs, target, bits in zip(*row, strict=True)
            ]
            for row in zip(lens.ids, lens.probs, lens.target, lens.entropy, strict=True)
        ]
        words = {"embed": "embedding", "last": "whole model"}
        stages = [words.get(name) or f"after layer {name.split('.')[1]}" for name in lens.stages]
        return {"tokens": self.tokens, "stages": stages, "cells": cells}

    def walk_weights(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first layer, weights (layers, H, T, T)) in slices that fit."""
        room = max(1, WEIGHT_ROOM // (self.body.n_head * len(self.ids) ** 2))
        for start in range(0, self.body.n_layer, room):
            layers = range(start, min(start + room, self.body.n_layer))
            points = [f"layer.{i}.attn.weights" for i in layers]
            yield start, capture(self.model, self.ids, points=points).stack("attn.weights")

    @cached_property
    def overview(self) -> tuple[np.ndarray, circuits.HeadScores]:
        """Thumbnails uint8 (L, H, S, S) of all heads, and their scores."""
        thumbs, scores = [], []
        for start, weights in self.walk_weights():
            self._kept = (start, weights)
            thumbs += [np.rint(255 * pool_weights(layer)).astype(np.uint8) for layer in weights]
            scores.append(circuits.score_heads(weights, self.ids))
        joined = {
            name: np.concatenate([getattr(part, name) for part in scores])
            for name in circuits.HeadScores.__dataclass_fields__
        }
        return np.stack(thumbs), circuits.HeadScores(**joined)

    def read_head(self, layer: int, head: int) -> np.ndarray:
        """Return the weights (T, T) of one head."""
        start, held = self._kept
        if not start <= layer < start + len(held):
            point = f"layer.{layer}.attn.weights"
            start, held = layer, capture(self.model, self.ids, points=[point])[point][None]
            self._kept = (start, held)
        return held[layer - start, head]

    def guess_next(self, at: int, seen: Capture | None = None) -> np.ndarray:
        """Return the probabilities (V,) of what follows place `at`, of another pass if one is given."""
        state = torch.from_numpy((seen or self.seen)["last"][at]).to(self.body.device)
        with torch.inference_mode():
            return self.body.read_stream(state).softmax(-1).cpu().numpy()

    def name_guesses(self, probs: np.ndarray, n: int = 8) -> list[tuple[int, str, float]]:
        """Return the likeliest tokens as (id, text, probability)."""
        top = np.argsort(-probs, kind="stable")[:n]
        return [(int(i), spell_tokens(self.tokenizer, [i])[0], float(probs[i])) for i in top]


def save_copying(losses: np.ndarray) -> float:
    """Return by how many nats the second half of a text said twice, [bos, *words, *words], is easier than the
    first; the first word of each half is left out, as nothing before it tells which comes.
    """
    n = len(losses) // 2
    return float(losses[1:n].mean() - losses[n + 1 :].mean()) if n > 1 else math.nan

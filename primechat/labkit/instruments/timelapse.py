"""The time machine of lab 02: a text read by every snapshot of a run.

Hides: which run has snapshots, and opening them. Reference: primechat.checkpoint.registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from primechat.checkpoint.registry import list_models, open_model
from primechat.labkit.instruments.scene import Scene, spell_tokens
from primechat.views.widgets.attention.stream import TimeView

if TYPE_CHECKING:
    from primechat.labkit.instruments.microscope import Microscope

HELD = 40  # opened snapshots kept; a small one takes a few megabytes


def find_run(identifier: str) -> tuple[str, list[int]]:
    """Return the run whose snapshots are shown, and their steps: a model's own if it has several, else the
    one that ships, else any.
    """
    entries = [entry for entry in list_models() if len(entry.snapshots) > 1]
    name = identifier.partition("@")[0]
    entries.sort(
        key=lambda e: (
            e.identifier.partition("@")[0] != name,
            e.by_product,
            not e.shipped,
            -len(e.snapshots),
        )
    )
    for best in entries[:1]:
        return ("shipped/" if best.shipped else "") + f"{best.family}/{best.tag}", list(
            best.snapshots
        )
    return "", []


class Timelapse:
    """The snapshots of one run under a slider, reading the text of a microscope."""

    def __init__(self, scope: Microscope) -> None:
        self.scope = scope
        self.models: dict[str, tuple[Any, Any]] = {}
        self.run, self.steps = "", list[int]()
        self.view = TimeView()
        self.scenes: dict[tuple[int, str], Scene] = {}
        scope.follow(self.view, self.refresh, ["moment", "at"], "")

    def choose_run(self) -> None:
        """Take the run that the present model asks for."""
        run, steps = find_run(self.scope.picker.identifier)
        if run != self.run:
            self.run, self.steps, self.models, self.scenes = run, steps, {}, {}
            self.view.steps, self.view.moment = steps, max(0, len(steps) - 1)

    def open_moment(self) -> Scene:
        """Return the text read by the snapshot under the slider."""
        step, text = self.steps[self.view.moment], self.scope.prompt.text
        name = f"{self.run}@snap:{step}"
        if name not in self.models:
            if len(self.models) >= HELD:
                self.models.pop(next(iter(self.models)))
            self.models[name] = open_model(name)[:2]
        if (step, text) not in self.scenes:
            self.scenes = {key: scene for key, scene in self.scenes.items() if key[1] == text}
            model, tokenizer = self.models[name]
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype=np.int64)
            self.scenes[step, text] = Scene(model, tokenizer, ids[: model.sequence_len])
        return self.scenes[step, text]

    def refresh(self) -> None:
        """Bring the view up to date."""
        self.choose_run()
        view = self.view
        if not self.steps:
            view.data = {
                "problem": "No run here has snapshots; train one with `primechat pretrain`."
            }
            return
        scene = self.open_moment()
        if len(scene.ids) < 3:
            return
        at = min(view.at, len(scene.ids) - 1) if view.at else len(scene.ids) - 1
        thumbs, _ = scene.overview
        lens, body = scene.lens, scene.body
        names = ["embedding", *(f"after layer {i}" for i in range(body.n_layer)), "whole model"]
        firsts = spell_tokens(scene.tokenizer, lens.ids[:, at, 0])
        width = body.n_head * body.head_dim
        with view.hold_sync():
            view.at = at
            view.thumbs = thumbs.tobytes()
            view.data = {
                "n_layer": body.n_layer,
                "n_head": body.n_head,
                "side": thumbs.shape[-1],
                "tokens": scene.tokens,
                "loss": scene.loss,
                "note": f"{self.run}: {body.n_layer} layers of width {width}, {len(self.steps)} snapshots.",
                "lens": [
                    [name, token, float(p)]
                    for name, token, p in zip(names, firsts, lens.probs[:, at, 0], strict=True)
                ],
                "guesses": [
                    {"label": text, "value": p}
                    for _, text, p in scene.name_guesses(scene.guess_next(at), 6)
                ],
            }

"""What is true of the reader's own model: the answers to lab 02's questions, measured.

Hides: nothing. Reference: primechat.metrics.circuits.
"""

from __future__ import annotations

import numpy as np

from primechat.lessons.instruments.scene import Scene
from primechat.metrics.circuits import scan_ablations

PLACES = ["itself", "the token before it", "the very first token", "something in between"]
STAGES = [
    "the embedding alone",
    "a layer of the first half",
    "a later one, before the last",
    "the last layer",
]
EFFECTS = ["less than 0.05", "0.05 to 0.3", "0.3 to 1", "more than 1"]


def find_favourite(scene: Scene) -> tuple[str, str]:
    """Return which of PLACES gets the most attention, the mean over all heads and tokens, and all shares in
    words. Tokens with fewer than three before them are left out: there the places fall together.
    """
    sums = np.zeros(3)
    for _, weights in scene.walk_weights():
        rows = np.arange(3, len(scene.ids))
        w = weights[:, :, rows]
        at = np.arange(len(rows))
        sums += [w[:, :, at, rows].sum(), w[:, :, at, rows - 1].sum(), w[:, :, at, 0].sum()]
    n = scene.body.n_layer * scene.body.n_head * max(1, len(scene.ids) - 3)
    shares = [*(sums / n), 1 - float(sums.sum() / n)]
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(PLACES, shares, strict=True))
    return PLACES[int(np.argmax(shares))], said


def find_worst(scene: Scene) -> tuple[str, str]:
    """Return which of EFFECTS the head has that the loss misses most; it and the worst MLP in words."""
    changes = dict(scan_ablations(scene.model, scene.ids))
    head, mlp = (
        max((part for part in changes if kind in part), key=lambda part: changes[part])
        for kind in ("head", "mlp")
    )
    effect = EFFECTS[int(np.searchsorted([0.05, 0.3, 1.0], changes[head], side="right"))]
    _, layer, _, number = head.split(".")
    return effect, (
        f"The head missed most is layer {layer}, head {number}: {changes[head]:+.2f} nats. "
        f"For comparison, the MLP missed most is that of layer {mlp.split('.')[1]}: {changes[mlp]:+.2f}."
    )


def find_settling(scene: Scene) -> tuple[str, str]:
    """Return in which of STAGES the first guess is first the whole model's own for at least half of the
    tokens, and the share at each stage in words.
    """
    lens = scene.lens
    same = (lens.ids[:, :, 0] == lens.ids[-1, :, 0]).mean(axis=1)[:-1]
    names = ["the embedding alone", *(f"layer {i}" for i in range(scene.body.n_layer))]
    stage, n_layer = (
        int(np.argmax(same >= 0.5)) if (same >= 0.5).any() else len(same) - 1,
        len(names) - 1,
    )
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, same, strict=True))
    place = 3 if stage == n_layer else 0 if stage == 0 else 1 if 2 * stage <= n_layer else 2
    return STAGES[place], said

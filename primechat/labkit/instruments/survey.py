"""What is true of the reader's own model: the answers to lab 02's questions, measured.

One text says little about a head: what is told of one is a mean over held-out passages, with the 95 %
interval by Student's t over these passages. Reference: primechat.interp.circuits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from primechat.errors import DataError
from primechat.interp.circuits import HeadScores, measure_losses, scan_ablations, score_heads
from primechat.interp.hooks import capture
from primechat.labkit.instruments.scene import Scene
from primechat.metrics.intervals import estimate_mean
from primechat.text.corpora import read_documents

PLACES = ["itself", "the token before it", "the very first token", "something in between"]
STAGES = [
    "the embedding alone",
    "a layer of the first half",
    "a later one, before the last",
    "the last layer",
]
EFFECTS = ["less than 0.02", "0.02 to 0.1", "0.1 to 0.5", "more than 0.5"]
N_PASSAGES, PASSAGE_TOKENS = 30, 64


def draw_passages(
    model: Any, tokenizer: Any, n: int = N_PASSAGES, n_tokens: int = PASSAGE_TOKENS
) -> np.ndarray:
    """Return beginnings of held-out chats as token ids (n, T), T at most `n_tokens` and the context: each
    from a chat of its own, so that they are independent, and always the same ones.

    Raises:
        DataError: not enough chats are so long.
    """
    n_tokens = min(n_tokens, model.sequence_len)
    documents = tokenizer.encode_batch(list(read_documents("chitchat", "val")))
    long = [ids for ids in documents if len(ids) >= n_tokens - 1]
    if len(long) < n:
        raise DataError(f"{len(long)} held-out chats have {n_tokens - 1} tokens; {n} are needed.")
    chosen = np.random.default_rng(0).choice(len(long), n, replace=False)
    return np.array([[tokenizer.bos_id, *long[i][: n_tokens - 1]] for i in chosen], dtype=np.int64)


def say_mean(values: Sequence[float] | np.ndarray, form: str) -> str:
    """Return a mean and half its 95 % interval, as `form` writes numbers."""
    mean, low, _ = estimate_mean(list(values))
    return f"{mean:{form}} ± {mean - low:{form.lstrip('+')}}"


# ---- what is read


def measure_places(scene: Scene) -> np.ndarray:
    """Return which share of the attention each of PLACES gets (4,): means over all heads and all tokens.

    Tokens with fewer than three before them are left out: there the places fall together.
    """
    sums = np.zeros(3)
    for _, weights in scene.walk_weights():
        rows = np.arange(3, len(scene.ids))
        w = weights[:, :, rows]
        at = np.arange(len(rows))
        sums += [w[:, :, at, rows].sum(), w[:, :, at, rows - 1].sum(), w[:, :, at, 0].sum()]
    shares = sums / (scene.body.n_layer * scene.body.n_head * max(1, len(scene.ids) - 3))
    return np.array([*shares, 1 - shares.sum()])


def count_places(n_tokens: int) -> np.ndarray:
    """Return what each of PLACES would get if every token read all that it sees alike (4,): chance."""
    each = float(np.mean([1 / (at + 1) for at in range(3, n_tokens)] or [0.25]))
    return np.array([each, each, each, 1 - 3 * each])


def find_favourite(scene: Scene, passages: np.ndarray) -> tuple[str, str]:
    """Return which of PLACES gets most beyond what chance would give it, and all shares in words.

    Args:
        scene: the reader's text; its shares are told beside those of the passages.
        passages: (N, T), which decide.
    """
    found = np.stack([measure_places(Scene(scene.model, scene.tokenizer, row)) for row in passages])
    chance = count_places(passages.shape[1])
    here, here_chance = measure_places(scene), count_places(len(scene.ids))
    said = "; ".join(
        f"{name} {say_mean(found[:, i], '.1%')} ({chance[i]:.1%}), on your text {here[i]:.0%} "
        f"({here_chance[i]:.0%})"
        for i, name in enumerate(PLACES)
    )
    return PLACES[int(np.argmax(found.mean(axis=0) / chance))], said


# ---- what a head is worth


def measure_cost(model: Any, passages: np.ndarray, part: str, whole: np.ndarray) -> np.ndarray:
    """Return by how many nats each passage's loss, `whole` (N,), grows with a part switched off (N,)."""
    return measure_losses(model, passages, (part,)).mean(axis=1) - whole


def find_worst(scene: Scene, passages: np.ndarray, *, search: bool = True) -> tuple[str, str]:
    """Return which of EFFECTS the head has, over the passages, that the reader's text misses most; in words
    also what the text alone says, and the MLP missed most.

    Args:
        scene: the reader's text, by which head and MLP are chosen.
        passages: (N, T), by which they are judged.
        search: also find the head that the passages miss most, which takes a pass a head.
    """
    changes = dict(scan_ablations(scene.model, scene.ids))
    head, mlp = (
        max((part for part in changes if kind in part), key=lambda part: changes[part])
        for kind in ("head", "mlp")
    )
    whole = measure_losses(scene.model, passages).mean(axis=1)
    costs = {part: measure_cost(scene.model, passages, part, whole) for part in (head, mlp)}
    said = (
        f"Your text misses {say_head(head)} most: {changes[head]:+.2f} nats. Over {len(passages)} held-out "
        f"passages the loss grows by {say_mean(costs[head], '+.2f')} without it. For comparison, the MLP "
        f"that your text misses most, of layer {mlp.split('.')[1]}: {changes[mlp]:+.2f} there, "
        f"{say_mean(costs[mlp], '+.2f')} over the passages."
    )
    if search:
        for part in changes:
            if "head" in part and part != head:
                costs[part] = measure_cost(scene.model, passages, part, whole)
        best = max((part for part in costs if "head" in part), key=lambda part: costs[part].mean())
        said += (
            " The passages miss it most of all heads, too."
            if best == head
            else f" They miss another head most: {say_head(best)}, {say_mean(costs[best], '+.2f')}."
        )
    effect = np.searchsorted([0.02, 0.1, 0.5], costs[head].mean(), side="right")
    return EFFECTS[int(effect)], said


def say_head(part: str) -> str:
    """Return the name of a head in words."""
    _, layer, _, number = part.split(".")
    return f"layer {layer}, head {number}"


# ---- where the answer is settled


def measure_agreement(scene: Scene) -> np.ndarray:
    """Return for which share of tokens each stage before the last has the whole model's first guess."""
    lens = scene.lens
    return (lens.ids[:, :, 0] == lens.ids[-1, :, 0]).mean(axis=1)[:-1]


def find_settling(scene: Scene, passages: np.ndarray) -> tuple[str, str]:
    """Return in which of STAGES the first guess is first the whole model's own for at least half of the
    tokens, the mean over passages (N, T), and the share at each stage in words.
    """
    found = np.stack(
        [measure_agreement(Scene(scene.model, scene.tokenizer, row)) for row in passages]
    )
    same = found.mean(axis=0)
    names = ["the embedding alone", *(f"layer {i}" for i in range(scene.body.n_layer))]
    n_layer = len(names) - 1
    stage = int(np.argmax(same >= 0.5)) if (same >= 0.5).any() else n_layer
    said = ", ".join(f"{name} {say_mean(found[:, i], '.0%')}" for i, name in enumerate(names))
    place = 3 if stage == n_layer else 0 if stage == 0 else 1 if 2 * stage <= n_layer else 2
    return STAGES[place], said


# ---- what heads are like


def average_scores(model: Any, texts: Iterable[np.ndarray]) -> tuple[HeadScores, HeadScores]:
    """Return what each head scores on texts (T,) of at least two tokens: the means over the texts, and half
    the widths of their 95 % intervals.
    """
    scores = []
    for ids in texts:
        weights = capture(model, ids, points=("layer.*.attn.weights",)).stack("attn.weights")
        scores.append(score_heads(weights, ids))
    means, halves = {}, {}
    for name in HeadScores.__dataclass_fields__:
        values = np.stack([getattr(score, name) for score in scores])  # (N, L, H)
        found = [estimate_mean(one)[:2] for one in values.reshape(len(values), -1).T]
        ends = np.array(found).T.reshape(2, *values.shape[1:])  # mean and low end, (2, L, H)
        means[name], halves[name] = ends[0], ends[0] - ends[1]
    return HeadScores(**means), HeadScores(**halves)

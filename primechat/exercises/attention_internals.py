"""Exercises of lab 02: the weights of a head, the score of a copying head, a logit as a sum.

Hides: the small examples that the checks try. Reference: Vaswani et al. 2017; Olsson et al. 2022; Elhage et
al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from primechat.exercises import Exercise, require

EPS = 1e-7  # of the final norm


def draw_numbers(seed: int, *shape: int) -> np.ndarray:
    """Return numbers that are the same at each try."""
    return np.random.default_rng(seed).normal(size=shape)


# ---- 1: the weights of a head


def weigh_tokens(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """Return what each token reads of each other, (T, T)."""
    scores = queries @ keys.T * scale
    scores[np.triu_indices(len(scores), 1)] = -np.inf
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def forget_mask(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """A mistake: later tokens are read."""
    shares = np.exp(queries @ keys.T * scale)
    return shares / shares.sum(axis=1, keepdims=True)


def sum_columns(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """A mistake: each token is read by one in all."""
    shares = np.tril(np.exp(queries @ keys.T * scale))
    return shares / shares.sum(axis=0)


def mask_with_zero(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """A mistake: a score of zero is not a share of zero."""
    shares = np.exp(np.tril(queries @ keys.T * scale))
    return shares / shares.sum(axis=1, keepdims=True)


def check_weights(attempt: Any) -> None:
    """Refuse anything but causal softmax weights."""
    q, k = draw_numbers(1, 5, 4), draw_numbers(2, 5, 4)
    got = np.asarray(attempt(q.copy(), k.copy(), 0.5), dtype=float)
    require(
        got.shape == (5, 5), "A row and a column a token", f"for 5 tokens the shape was {got.shape}"
    )
    ahead = float(np.abs(np.triu(got, 1)).max())
    require(ahead < 1e-9, "No token reads the future", f"a token gave {ahead:.3f} to a later one")
    sums = got.sum(axis=1)
    require(
        np.allclose(sums, 1),
        "Each row sums to one",
        f"the rows sum to {np.round(sums, 3).tolist()}",
    )
    same = np.asarray(attempt(np.zeros((3, 4)), np.ones((3, 4)), 0.5))[2]
    require(
        np.allclose(same, 1 / 3), "Equal scores, equal shares", f"equal scores gave {same.round(3)}"
    )
    steep = np.asarray(attempt(q.copy(), k.copy(), 0.0))[4]
    require(
        np.allclose(steep, 0.2),
        "The scale counts",
        f"with scale 0 the last row was {steep.round(3)}",
    )
    want = weigh_tokens(q, k, 0.5)
    require(
        np.allclose(got, want),
        "Queries ask, keys answer",
        f"row 1 was {got[1].round(3).tolist()}, not {want[1].round(3).tolist()}",
    )


# ---- 2: the score of a copying head


def score_copying(weights: np.ndarray, ids: list[int]) -> float:
    """Return the mean weight on tokens that followed an earlier occurrence of the present one."""
    shares = []
    for t in range(len(ids)):
        after = [s + 1 for s in range(t) if ids[s] == ids[t] and s + 1 < t]
        if after:
            shares.append(sum(weights[t, s] for s in after))
    return sum(shares) / len(shares)


def read_places(
    weights: np.ndarray, ids: list[int], choose: Callable[[int, list[int]], list[int]]
) -> float:
    """Return the mean weight on other places: what mistakes read, of a token and its earlier places."""
    rows = [(t, choose(t, [s for s in range(t) if ids[s] == ids[t]])) for t in range(len(ids))]
    shares = [sum(weights[t, s] for s in read) for t, read in rows if read]
    return sum(shares) / len(shares)


def mean_all(weights: np.ndarray, ids: list[int]) -> float:
    """A mistake: tokens that never came before count as zeros."""
    total = 0.0
    for t in range(len(ids)):
        total += sum(weights[t, s + 1] for s in range(t) if ids[s] == ids[t] and s + 1 < t)
    return total / len(ids)


def check_copying(attempt: Any) -> None:
    """Refuse anything but the induction score."""
    ids = [5, 7, 9, 5, 7, 9]
    perfect = np.zeros((6, 6))
    perfect[np.arange(3), 0] = 1
    perfect[np.arange(3, 6), np.arange(1, 4)] = 1
    same = np.eye(6)
    same[np.arange(3, 6)] = np.eye(6)[:3]
    ahead = np.triu(np.ones((6, 6)), 1)
    even = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    thrice = (1 / 3 + 1 / 4 + 2 / 5) / 3
    for weights, text, want, rule, head in (
        (
            same,
            ids,
            0,
            "What came next counts, not the word itself",
            "a head that reads the same word's earlier place",
        ),
        (ahead, ids, 0, "Rows read, columns are read", "weights only above the diagonal"),
        (
            perfect,
            ids,
            1,
            "The mean is over words that came before",
            "a head that copies perfectly",
        ),
        (
            even,
            [4, 8, 4, 8, 4],
            thrice,
            "Every earlier occurrence counts",
            "even weights on a word said three times",
        ),
        (
            even[:4, :4],
            [4, 8, 4, 4],
            (1 / 3 + 1 / 4) / 2,
            "Only places before the word itself",
            "even weights on the ids 4, 8, 4, 4, where 4 follows itself,",
        ),
    ):
        got = float(attempt(weights.copy(), list(text)))
        require(abs(got - want) < 1e-9, rule, f"{head} scored {got:.3f}, not {want:.3f}")


# ---- 3: a logit as a sum


def split_logit(written: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return what each part adds to the logit: written (N, C) sums to the stream, row (C,) is the token's."""
    stream = written.sum(axis=0)
    return written @ row / np.sqrt((stream**2).mean() + EPS)


def make_shares(written: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A mistake: shares of one instead of shares of the logit."""
    values = written @ row
    return values / values.sum()


def check_split(attempt: Any) -> None:
    """Refuse anything but the parts of a logit under a frozen norm."""
    written, row = draw_numbers(3, 4, 8), draw_numbers(4, 8)
    got = np.asarray(attempt(written.copy(), row.copy()), dtype=float)
    require(got.shape == (4,), "A number a part", f"for 4 parts the shape was {got.shape}")
    stream = written.sum(axis=0)
    scale = 1 / np.sqrt((stream**2).mean() + EPS)
    one = np.asarray(attempt(written * [[1], [0], [1], [1]], row))
    require(
        abs(one[1]) < 1e-9,
        "Who writes nothing adds nothing",
        f"a part that wrote zeros got {one[1]:.3f}",
    )
    ratio = got / (written @ row)
    require(
        np.allclose(ratio, ratio[0]),
        "One scale for all parts",
        f"the parts were scaled by {ratio.round(2).tolist()}: the norm is of the whole stream",
    )
    logit = float(stream @ row * scale)
    require(
        abs(got.sum() - logit) < 1e-4,  # whatever small number keeps the root from 0
        "The parts sum to the logit",
        f"they sum to {got.sum():.3f}, the logit is {logit:.3f}",
    )


EXERCISES = (
    Exercise(
        title="What a token reads",
        task="A head turns each token into a **query** (what it looks for) and a **key** (what it offers). "
        "Write `weigh_tokens(queries, keys, scale)`: for `T` tokens, both `(T, D)`, return the `(T, T)` "
        "weights, where row `t` is what token `t` reads.\n\nThe score of a pair is the product of query and "
        "key times `scale`; a token reads itself and what came before; the softmax of its scores are its "
        "weights.",
        check=check_weights,
        hint="Scores of later tokens must be −infinity before the softmax, so that their share is 0.",
        solution=weigh_tokens,
        mistakes=(
            (forget_mask, "No token reads the future"),
            (sum_columns, "Each row sums to one"),
            (mask_with_zero, "No token reads the future"),
            (lambda queries, keys, scale: weigh_tokens(queries, keys, 1.0), "The scale counts"),
            (
                lambda queries, keys, scale: weigh_tokens(keys, queries, scale),
                "Queries ask, keys answer",
            ),
        ),
        praise="This is all that decides what a head reads. Every square in the grid above is one of these.",
    ),
    Exercise(
        title="Find the head that copies",
        task="A copying head looks for an earlier place of the present token, and reads what **followed** it "
        "there. Write `score_copying(weights, ids)`: `weights` is `(T, T)`, `ids` the `T` tokens. For each "
        "token that came before, add up its weights on the tokens that followed those earlier places; return "
        "the mean over such tokens. A place not before the token itself does not count.",
        check=check_copying,
        hint="If `ids[s] == ids[t]` with `s < t`, the place that counts is `s + 1`, as long as it is below "
        "`t`.",
        solution=score_copying,
        mistakes=(
            (
                lambda weights, ids: read_places(weights, ids, lambda t, before: before),
                "What came next counts, not the word itself",
            ),
            (lambda weights, ids: score_copying(weights.T, ids), "Rows read, columns are read"),
            (mean_all, "The mean is over words that came before"),
            (
                lambda weights, ids: read_places(
                    weights, ids, lambda t, s: [x + 1 for x in s if x + 1 < t][-1:]
                ),
                "Every earlier occurrence counts",
            ),
            (
                lambda weights, ids: read_places(
                    weights, ids, lambda t, before: [s + 1 for s in before]
                ),
                "Only places before the word itself",
            ),
        ),
        praise="Researchers call it the induction score; the strip above shows it for every head.",
    ),
    Exercise(
        title="A logit is a sum",
        task="Each part of a model adds a vector to one **stream**; behind the last layer the stream is "
        "normed (divided by the root of the mean of its squares) and multiplied with the token's row of the "
        "output matrix. Write `split_logit(written, row)`: `written` is `(N, C)`, what each of `N` parts "
        "wrote, `row` is `(C,)`. Return `N` numbers that sum to the logit.",
        check=check_split,
        hint="The norm's divisor depends on the whole stream, and is one number: the same for all parts.",
        solution=split_logit,
        mistakes=(
            (lambda written, row: written @ row, "The parts sum to the logit"),
            (
                lambda written, row: written @ row / np.sqrt((written**2).mean(axis=1) + EPS),
                "One scale for all parts",
            ),
            (make_shares, "The parts sum to the logit"),
            (lambda written, row: split_logit(written, row).sum(), "A number a part"),
        ),
        praise="With the scale held fixed a prediction has authors, and you can name them.",
    ),
)

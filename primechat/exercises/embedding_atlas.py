"""Lab 03: its exercises, the neighbours of a vector, how far a map can be trusted, one basis for all times.

Hides: the small clouds on which an attempt is tried. Reference: primechat.interp.embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from primechat.exercises import Exercise, require


def make_cloud(n: int = 40, width: int = 6, seed: int = 1) -> np.ndarray:
    """Return vectors of very different lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * rng.uniform(0.2, 5, size=(n, 1))


def rank_cosines(table: np.ndarray, row: int, k: int) -> list[int]:
    """Return the k nearest rows, the plain way."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[row]))
    return [int(i) for i in order if i != row][:k]


def check_nearest(attempt: Callable[[np.ndarray, int, int], Any]) -> None:
    """Try `nearest` on clouds of known neighbours."""
    table = make_cloud()
    kept = table.copy()
    got = [int(i) for i in attempt(table, 3, 5)]
    want = rank_cosines(table, 3, 5)
    require(
        np.array_equal(table, kept),
        "The table stays as it is",
        "nearest changed the numbers in the table",
    )
    require(
        3 not in got,
        "No token is its own neighbour",
        f"nearest(table, 3, 5) returned {got}, with 3 in it",
    )
    require(len(got) == 5 == len(set(got)), "Exactly k", f"nearest(table, 3, 5) returned {got}")
    require(
        got != [int(i) for i in np.argsort(table @ table[3] / np.linalg.norm(table, axis=1))[:5]],
        "Nearest, not farthest",
        f"{got} are the rows that point the other way",
    )
    require(
        set(got) == set(want),
        "Lengths do not count",
        f"nearest(table, 3, 5) returned {got}, not {want}",
    )
    require(
        got == want, "The nearest comes first", f"{got} has the right rows in another order: {want}"
    )


def nearest(table: np.ndarray, row: int, k: int) -> Any:
    """The solution of the first exercise."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit @ unit[row]
    cosines[row] = -np.inf
    return np.argsort(-cosines)[:k]


def nearest_dot(table: np.ndarray, row: int, k: int) -> Any:
    """Forgets to divide by the lengths."""
    scores = table @ table[row]
    scores[row] = -np.inf
    return np.argsort(-scores)[:k]


def nearest_self(table: np.ndarray, row: int, k: int) -> Any:
    """Finds the token itself first."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return np.argsort(-(unit @ unit[row]))[:k]


def nearest_far(table: np.ndarray, row: int, k: int) -> Any:
    """Sorts the wrong way."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return np.argsort(unit @ unit[row])[:k]


def check_overlap(attempt: Callable[[Sequence[int], Sequence[int]], Any]) -> None:
    """Try `overlap` on lists worked out by hand."""
    same = float(attempt([1, 2, 3, 4], [4, 3, 2, 1]))
    require(
        same != 1.0,
        "In percent",
        "overlap([1, 2, 3, 4], [4, 3, 2, 1]) returned 1.0; all of them are 100 %",
    )
    require(
        same == 100,
        "The order does not count",
        f"overlap([1, 2, 3, 4], [4, 3, 2, 1]) returned {same}; all four",
    )
    half = float(attempt([1, 2, 3, 4], [1, 9, 2, 8]))
    require(
        half == 50,
        "Divide by the true neighbours",
        f"overlap([1, 2, 3, 4], [1, 9, 2, 8]) returned {half:.3g}; two of the four true neighbours are 50 %",
    )
    none = float(attempt([1, 2], [3, 4]))
    require(none == 0, "Nothing in common is 0", f"overlap([1, 2], [3, 4]) returned {none}")


def overlap(true: Sequence[int], drawn: Sequence[int]) -> float:
    """The solution of the second exercise."""
    return 100 * len(set(true) & set(drawn)) / len(true)


def check_places(attempt: Callable[[list[np.ndarray]], Any]) -> None:
    """Try `place_all` on a cloud that is long in two directions, and moves."""
    rng = np.random.default_rng(5)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    last = rng.normal(size=(60, 5)) * [9, 5, 1, 0.5, 0.1] @ turn.T + 20
    push = 3 * turn[:, 0]
    got = [np.asarray(places, dtype=float) for places in attempt([last + push, last])]
    shapes = [places.shape for places in got]
    require(
        shapes == [(60, 2)] * 2,
        "Two numbers a point",
        f"the places have the shapes {shapes}, not (60, 2) twice",
    )
    spread = got[1].var(0).sum() / last.var(0).sum()
    require(
        spread > 0.9,
        "The axes of most variance",
        f"the places hold {100 * spread:.0f} % of the variance; the best two axes hold more than 90 %",
    )
    middle = np.abs(got[1].mean(0)).max()
    require(
        middle < 1e-6,
        "The middle is taken away",
        f"the last snapshot's places have the mean {got[1].mean(0)}",
    )
    moved = np.linalg.norm(got[0] - got[1], axis=1)
    require(
        np.allclose(moved, 3, atol=1e-3),
        "One basis for all",
        f"all points moved by 3, the places say {moved.mean():.2f}: they do not share axes and middle",
    )


def place_all(tables: list[np.ndarray]) -> list[np.ndarray]:
    """The solution of the third exercise."""
    middle = tables[-1].mean(0)
    _, _, axes = np.linalg.svd(tables[-1] - middle, full_matrices=False)
    return [(table - middle) @ axes[:2].T for table in tables]


def place_raw(tables: list[np.ndarray]) -> list[np.ndarray]:
    """Takes no middle away."""
    _, _, axes = np.linalg.svd(tables[-1] - tables[-1].mean(0), full_matrices=False)
    return [table @ axes[:2].T for table in tables]


def place_least(tables: list[np.ndarray]) -> list[np.ndarray]:
    """Takes the last axes instead of the first."""
    middle = tables[-1].mean(0)
    _, _, axes = np.linalg.svd(tables[-1] - middle, full_matrices=False)
    return [(table - middle) @ axes[-2:].T for table in tables]


EXERCISES = (
    Exercise(
        title="Find the neighbours",
        task="Write `nearest(table, row, k)`: the numbers of the **k rows** of `table` that point most "
        "nearly the same way as row `row`, the nearest first, without `row` itself.\n\n"
        "The **cosine** of two vectors is their product divided by both lengths: 1 where they point the "
        "same way, 0 where they are at right angles.",
        check=check_nearest,
        hint="Divide every row by its length first; then one matrix product gives all cosines.",
        solution=nearest,
        mistakes=(
            (nearest_dot, "Lengths do not count"),
            (nearest_self, "No token is its own neighbour"),
            (nearest_far, "Nearest, not farthest"),
            (lambda table, row, k: list(nearest(table, row, k))[::-1], "The nearest comes first"),
        ),
        praise="This is what the left list beside the map shows.",
    ),
    Exercise(
        title="Does the map keep them?",
        task="Write `overlap(true, drawn)`: how many **percent** of the true neighbours are also among "
        "those on the picture. Both are lists of as many row numbers.",
        check=check_overlap,
        hint="Python's sets know what two lists have in common.",
        solution=overlap,
        mistakes=(
            (
                lambda true, drawn: 100 * float(np.mean(np.array(true) == np.array(drawn))),
                "The order does not count",
            ),
            (lambda true, drawn: len(set(true) & set(drawn)) / len(true), "In percent"),
            (
                lambda true, drawn: 100 * len(set(true) & set(drawn)) / len(set(true) | set(drawn)),
                "Divide by the true neighbours",
            ),
        ),
        praise="This is the number above the two lists. Beside it always stands what chance would give.",
    ),
    Exercise(
        title="One basis for all times",
        task="A run left several snapshots of a table. Write `place_all(tables)`: the places, **two "
        "numbers a point**, of every snapshot, so that motion on the map is motion of the vectors.\n\n"
        "Find the middle and the two axes of most variance on the **last** table, and use them for all.",
        check=check_places,
        hint="`np.linalg.svd(x, full_matrices=False)` of the centered table returns the axes as rows of its "
        "third result, the longest first.",
        solution=place_all,
        mistakes=(
            (lambda tables: [place_all([table])[0] for table in tables], "One basis for all"),
            (place_raw, "The middle is taken away"),
            (place_least, "The axes of most variance"),
        ),
        praise="With a basis for each snapshot the map would spin and flip though nothing had changed.",
    ),
)

# ruff: noqa: E501 (a task is a line)
"""Exercises of lab 07: an adapter's sum, and its size.

Hides: the small matrices that the checks try. Reference: Hu et al. 2021.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from primechat.exercises import Exercise, require


def draw(seed: int, *shape: int) -> np.ndarray:
    """Return numbers that are the same at each try."""
    return np.random.default_rng(seed).normal(size=shape)


def adapt(x: np.ndarray, w: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Return what the map and its adapter make of x."""
    return x @ w.T + scale * (x @ a.T) @ b.T


def check_adapt(attempt: Any) -> None:
    """Refuse anything but y = Wx + s B(Ax)."""
    x, w, a, b = draw(1, 5, 6), draw(2, 4, 6), draw(3, 2, 6), draw(4, 4, 2)
    fresh = np.asarray(attempt(x, w, a, np.zeros_like(b), 2.0))
    require(fresh.shape == (5, 4), "An output a row", f"for 5 rows the shape was {fresh.shape}")
    require(np.allclose(fresh, x @ w.T), "Nothing at first", "with B = 0 the result was not x W^T")
    off = np.asarray(attempt(x, w, a, b, 0.0))
    require(
        np.allclose(off, x @ w.T), "The dial turns it off", "with scale 0 the result was not x W^T"
    )
    twice = np.asarray(attempt(x, w, a, b, 2.0)) - x @ w.T
    require(
        np.allclose(twice, 2 * (x @ a.T) @ b.T),
        "The adapter is added",
        "W^T apart, it was not 2 (x A^T) B^T",
    )


def count_numbers(n_in: int, n_out: int, rank: int) -> int:
    """Return how many numbers an adapter of one map has."""
    return rank * (n_in + n_out)


def check_count(attempt: Any) -> None:
    """Refuse a wrong size."""
    got = attempt(256, 1024, 8)
    require(
        attempt(256, 1024, 16) == 2 * got,
        "Twice the rank, twice the size",
        f"rank 8 gave {got}, rank 16 {attempt(256, 1024, 16)}",
    )
    require(
        attempt(1024, 256, 8) == got,
        "In and out count alike",
        f"256 to 1024 gave {got}, the other way not",
    )
    require(got == 10_240, "Two matrices", f"for 256 in, 1024 out, rank 8 it was {got}, not 10240")


EXERCISES = (
    Exercise(
        title="An adapter's sum",
        task="A map makes `x @ w.T` of the rows of `x`. Add an adapter: `a` has shape (rank, in), `b` (out, rank). "
        "Return **what the map gives, and scale times what b makes of what a makes of x**.",
        check=check_adapt,
        hint="First `x @ a.T`, which is as narrow as the rank, then `@ b.T`.",
        solution=adapt,
        mistakes=(
            (lambda x, w, a, b, scale: scale * (x @ a.T) @ b.T, "Nothing at first"),
            (lambda x, w, a, b, scale: adapt(x, w, a, b, 1.0), "The dial turns it off"),
            (lambda x, w, a, b, scale: scale * adapt(x, w, a, b, 1.0), "Nothing at first"),
        ),
        praise="As b is zero before training, a fresh adapter changes nothing at all.",
    ),
    Exercise(
        title="How small is it?",
        task="Return **how many numbers the adapter of one map has**, from the map's inputs, outputs and the rank.",
        check=check_count,
        hint="Write down the shapes of a and b and count.",
        solution=count_numbers,
        mistakes=(
            (lambda n_in, n_out, rank: n_in * n_out, "Twice the rank, twice the size"),
            (lambda n_in, n_out, rank: rank * n_in, "In and out count alike"),
            (lambda n_in, n_out, rank: rank * n_in * n_out, "Two matrices"),
        ),
        praise="For 256 to 1,024 and rank 8: 10,240 instead of 262,144 numbers.",
    ),
)

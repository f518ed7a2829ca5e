# ruff: noqa: E501 (a task is a line)
"""Exercises of lab 08: the distance to a teacher, the rest of the probabilities, and retention.

Hides: the small distributions that the checks try. Reference: Hinton et al. 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from primechat.exercises import Exercise, require


def soften(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities at a temperature."""
    z = np.exp((logits - logits.max()) / temperature)
    return z / z.sum()


def measure_gap(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Return T^2 KL(teacher, student) of two rows of logits."""
    p, q = (np.exp((z - z.max()) / temperature) for z in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return float(temperature**2 * (p * np.log(p / q)).sum())


def forget_square(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """A mistake: not scaled back."""
    return measure_gap(student, teacher, temperature) / temperature**2


def cross_gap(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """A mistake: the cross-entropy, which is not zero for equals."""
    p, q = soften(teacher, temperature), soften(student, temperature)
    return float(temperature**2 * -(p * np.log(q)).sum())


def check_gap(attempt: Any) -> None:
    """Refuse anything but the softened KL."""
    s, t = np.array([2.0, 0.5, -1.0]), np.array([0.0, 1.5, 0.3])
    same = float(attempt(t.copy(), t.copy(), 2.0))
    require(
        abs(same) < 1e-6,
        "Nothing between equals",
        f"a student that is its teacher was {same:.3f} away",
    )
    got, want, back = float(attempt(s, t, 1.0)), measure_gap(s, t, 1.0), measure_gap(t, s, 1.0)
    require(
        abs(got - back) > 1e-6,
        "The teacher leads",
        f"it was {got:.4f}, which is KL(student, teacher)",
    )
    require(abs(got - want) < 1e-6, "KL at temperature 1", f"it was {got:.4f}, not {want:.4f}")
    got, want = float(attempt(s, t, 3.0)), measure_gap(s, t, 3.0)
    require(
        abs(got - want) < 1e-6, "Scaled back", f"at temperature 3 it was {got:.4f}, not {want:.4f}"
    )


def bucket(p: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest probabilities, largest first, and the sum of all the others."""
    top = np.sort(p)[::-1][:k]
    return np.append(top, 1 - top.sum())


def check_bucket(attempt: Any) -> None:
    """Refuse what is no distribution with a rest."""
    p = np.array([0.05, 0.5, 0.15, 0.1, 0.2])
    got = np.asarray(attempt(p.copy(), 2), dtype=float)
    require(got.shape == (3,), "k and a rest", f"for k = 2 there were {got.size} numbers")
    require(
        np.allclose(got[:2], [0.5, 0.2]),
        "The kept stay as they are",
        f"the first two were {got[:2].round(3)}",
    )
    require(abs(got.sum() - 1) < 1e-9, "A sum of one", f"they sum to {got.sum():.3f}")


def measure_retention(untrained: float, student: float, teacher: float) -> float:
    """Return what share of the teacher's gain over an untrained model a student has."""
    return (untrained - student) / (untrained - teacher)


def check_retention(attempt: Any) -> None:
    """Refuse anything but the share of the gain."""
    require(
        abs(attempt(3.0, 1.5, 1.5) - 1) < 1e-9,
        "As good is 1",
        f"it was {attempt(3.0, 1.5, 1.5):.3f}",
    )
    require(
        abs(attempt(3.0, 3.0, 1.5)) < 1e-9, "Untrained is 0", f"it was {attempt(3.0, 3.0, 1.5):.3f}"
    )
    require(
        abs(attempt(4.0, 2.0, 1.0) - 2 / 3) < 1e-9,
        "A share of the gain",
        f"for 4, 2 and 1 it was {attempt(4.0, 2.0, 1.0):.3f}",
    )


EXERCISES = (
    Exercise(
        title="The distance to a teacher",
        task="Two rows of scores, the student's and the teacher's. Divide both by the temperature, make "
        "probabilities q and p of them, and return **T² times the sum of p ln(p / q)**.",
        check=check_gap,
        hint="softmax(z / T); subtract the largest score first, so that nothing overflows.",
        solution=measure_gap,
        mistakes=(
            (
                lambda student, teacher, temperature: measure_gap(teacher, student, temperature),
                "The teacher leads",
            ),
            (forget_square, "Scaled back"),
            (cross_gap, "Nothing between equals"),
        ),
        praise="T² keeps the gradients as large as those of the plain loss, whatever the temperature.",
    ),
    Exercise(
        title="The rest counts",
        task="Keep the **k largest probabilities**, largest first, and add **one more number for all the others** "
        "together, so that the file of a teacher stays small and tells no lie.",
        check=check_bucket,
        hint="What is left after the k largest is 1 minus their sum.",
        solution=bucket,
        mistakes=(
            (lambda p, k: np.sort(p)[::-1][:k], "k and a rest"),
            (lambda p, k: bucket(p, k) / bucket(p, k)[:k].sum(), "The kept stay as they are"),
            (lambda p, k: np.append(np.sort(p)[::-1][:k], 0.0), "A sum of one"),
        ),
        praise="Scaled up to one without the rest, the student would learn that nothing else can follow.",
    ),
    Exercise(
        title="Retention",
        task="From the bits per byte of an untrained model, a student and its teacher, return **the share of the "
        "teacher's gain that the student has**: 1 if it is as good, 0 if it has learned nothing.",
        check=check_retention,
        hint="The gain of each is the untrained model's figure minus its own.",
        solution=measure_retention,
        mistakes=(
            (lambda untrained, student, teacher: teacher / student, "Untrained is 0"),
            (lambda untrained, student, teacher: student / teacher - 1, "As good is 1"),
            (
                lambda untrained, student, teacher: (
                    ((untrained - student) / (untrained - teacher)) ** 2
                ),
                "A share of the gain",
            ),
        ),
    ),
)

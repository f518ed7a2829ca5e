"""Each exercise's check accepts its solution and refuses each seeded mistake under the rule it breaks."""

from __future__ import annotations

import importlib
import math
import pkgutil

import pytest

import primechat.exercises as lessons
from primechat.exercises import Broken, Exercise, is_stub

FOUND = {
    name: getattr(importlib.import_module(f"primechat.exercises.{name}"), "EXERCISES", ())
    for _, name, _ in pkgutil.iter_modules(lessons.__path__)
}
EXERCISES = [
    pytest.param(one, id=f"{name}-{one.title}") for name, found in FOUND.items() for one in found
]


def test_titles_are_told_apart() -> None:
    titles = [exercise.title for found in FOUND.values() for exercise in found]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_check_knows_right_from_wrong(exercise: Exercise) -> None:
    assert (
        not is_stub(exercise.solution)
        and exercise.hint
        and exercise.task
        and exercise.solution_text
    )
    exercise.check(exercise.solution)
    assert len(exercise.mistakes) >= 3 and len({rule for _, rule in exercise.mistakes}) >= 2
    for attempt, rule in exercise.mistakes:
        with pytest.raises(Broken) as refused:
            exercise.check(attempt)
        assert refused.value.rule == rule and len(str(refused.value)) > 10, str(refused.value)


@pytest.mark.parametrize("stub", [lambda x: ..., lambda x: None, None, ...])
def test_stub_is_no_attempt(stub: object) -> None:
    assert is_stub(stub)


def test_function_that_returns_a_number_is_an_attempt() -> None:
    def always_one(step: int, steps: int) -> float:
        return 1.0

    assert not is_stub(always_one) and not is_stub(lambda step, steps: 0)


@pytest.mark.parametrize(
    ("lab", "index", "attempt"),
    [
        (
            "start_here",
            1,
            lambda nats, n_bytes: nats * 1.4427 / n_bytes,
        ),  # as the card's own sentence says
        ("pretraining", 0, lambda nats, n_bytes: nats / 0.693 / n_bytes),  # as its hint says
        ("autochat_entropy", 0, lambda p: -sum(x * math.log(x + 1e-8) for x in p)),
    ],
)
def test_check_accepts_what_is_right_but_for_rounding(
    lab: str, index: int, attempt: object
) -> None:
    FOUND[lab][index].check(attempt)

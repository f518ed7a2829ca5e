"""Each exercise's check accepts its solution and refuses each seeded mistake under the rule it breaks."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import primechat.lessons as lessons
from primechat.lessons import Broken, Exercise, is_stub

FOUND = {
    name: getattr(importlib.import_module(f"primechat.lessons.{name}"), "EXERCISES", ())
    for _, name, _ in pkgutil.iter_modules(lessons.__path__)
}
EXERCISES = [pytest.param(one, id=f"{name}-{one.title}") for name, found in FOUND.items() for one in found]


def test_titles_are_told_apart() -> None:
    titles = [exercise.title for found in FOUND.values() for exercise in found]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_check_knows_right_from_wrong(exercise: Exercise) -> None:
    assert not is_stub(exercise.solution) and exercise.hint and exercise.task and exercise.solution_text
    exercise.check(exercise.solution)
    assert len(exercise.mistakes) >= 3 and len({rule for _, rule in exercise.mistakes}) >= 2
    for attempt, rule in exercise.mistakes:
        with pytest.raises(Broken) as refused:
            exercise.check(attempt)
        assert refused.value.rule == rule and len(str(refused.value)) > 10, str(refused.value)

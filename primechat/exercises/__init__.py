"""What the labs stand on: their instruments, and their exercises with checks, hints and solutions.

A lab's exercises are one tuple `EXERCISES` in a module here that is named after the lab
(exercises/tokenizer_playground.py for 01), or in the one that holds its instruments.
tests/exercises/test_lessons.py runs every check on its solution, which must pass, and on each mistake (three
or more), which must break the rule that stands beside it. Checks import lazily what is slow to import.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Broken(Exception):
    """A rule does not hold: `rule` names it in a few words, the text says in a sentence what was seen."""

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(sentence)
        self.rule = rule


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One thing to try.

    Attributes:
        title: a few words.
        task: what to write, in plain words, with `code` and **bold**; an empty line parts paragraphs.
        check: takes the attempt (a function or a value); raises Broken at the first rule that does not hold.
        hint: one sentence that helps without telling.
        solution: an attempt that passes; a function's source is what a learner sees.
        mistakes: pairs (attempt, rule): each must be refused under exactly that rule.
        praise: what a learner reads who has solved it: what it means, in a sentence.
    """

    title: str
    task: str
    check: Callable[[Any], None]
    hint: str
    solution: Any
    mistakes: tuple[tuple[Any, str], ...]
    praise: str = "Every rule holds."

    @property
    def solution_text(self) -> str:
        """The solution as a learner would write it."""
        if inspect.isfunction(self.solution):
            return textwrap.dedent(inspect.getsource(self.solution)).strip()
        return repr(self.solution)


def require(holds: bool, rule: str, sentence: str) -> None:
    """Raise Broken where a rule does not hold: its name, as "No text is lost", and what was seen, with the
    values, as "decode(encode('é')) returned 'e'".
    """
    if not holds:
        raise Broken(rule, sentence)


def is_stub(attempt: Any) -> bool:
    """Tell whether nothing has been tried yet: None, `...`, or a function whose body is `...`."""
    if attempt is None or attempt is Ellipsis:
        return True
    if not inspect.isfunction(attempt):
        return False
    code = attempt.__code__
    stubs = (
        _empty.__code__.co_code,
        _noted.__code__.co_code,
    )  # `return 1.0` has the code of the second
    return not code.co_names and code.co_code in stubs and code.co_consts[-1] in (None, ...)


def _empty() -> None: ...


def _noted() -> None:
    """A function with a docstring alone."""

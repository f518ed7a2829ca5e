"""Keyword options by name: a misspelled one is answered with those that there are.

Python says only that an argument is unexpected. The error here is a TypeError too, as callers expect.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from primechat.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


class OptionError(ConfigError, TypeError):
    """An option that a function does not have."""


def check_options(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Refuse names that are not among the known ones.

    Raises:
        OptionError: the first such name, what was perhaps meant, and all options.
    """
    names = list(known)
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? Its" if near else "its"
            raise OptionError(
                f"{function} has no option {name!r:.40}; {meant} options are {', '.join(names)}."
            )


def name_options(function: Function) -> Function:
    """Return a function that answers a wrong option with the right ones."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        check_options(options, known, function.__name__)
        return function(*args, **options)

    return cast(Function, call)

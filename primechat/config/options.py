"""Checks of keyword options: a misspelled option raises an error that lists the existing ones.

Python says only that an argument is unexpected. The error here is also a TypeError, as callers expect.
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
    """Raise an error if an option is not among the known ones.

    Raises:
        OptionError: an option is unknown; the message names it, the closest match and all options.
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
    """Return the function with checked options: an unknown one raises an OptionError."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        check_options(options, known, function.__name__)
        return function(*args, **options)

    return cast(Function, call)

"""Counterparts of the lab functions for an exported script: settings are flags, a stage runs at once.

In a notebook, the same names stand for forms and buttons. Reference: primechat.labkit.lab, which has the same
functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from primechat.cli.main import (
    call_stage,
    describe_result,
    explain_end,
    parse_flags,
    read_config_file,
    take_option,
)
from primechat.cli.output import install_guard

__all__ = ["settings", "stage", "summary"]


def settings(config: Any, simple: Sequence[str] = (), *, title: str = "") -> Any:
    """Return a namespace whose `config` is the given one, or that of --config FILE, updated by the flags."""
    install_guard()
    try:
        return SimpleNamespace(config=read_flags(config))
    except Exception as error:
        sys.exit(explain_end(error))


def read_flags(config: Any) -> Any:
    """Return a config updated by the command line of this script.

    Raises:
        ConfigError: a flag has a value that is not allowed.
    """
    words = sys.argv[1:]
    file = take_option(words, "--config")
    start = read_config_file(Path(file), type(config)) if file else config
    notes = "\n\n--config FILE starts from a saved config.json."
    return parse_flags(Path(sys.argv[0]).name, type(config), words, start, notes)


def stage(function: Callable[..., Any], config: Any, *, title: str = "") -> Any:
    """Run a stage now and return a namespace with its `result`; a failure is printed and ends the script."""
    try:
        return SimpleNamespace(result=call_stage(function, config), config=config)
    except Exception as error:
        sys.exit(explain_end(error))


def summary(result: Any, *, title: str = "", notes: Sequence[str] = ()) -> None:
    """Print the result of a run, and notes."""
    import os

    result = getattr(result, "result", result)  # the result itself, or what `stage` returned
    if result is not None and os.environ.get("RANK", "0") == "0":
        print("\n".join([describe_result(result), *notes]))

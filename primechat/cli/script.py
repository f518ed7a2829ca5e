"""What an exported script has in place of the lab: settings are flags, a stage runs at once, no widgets.

Hides: that the same names mean forms and buttons in a notebook. Reference: primechat.labkit.lab,
whose calls these are.
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
    read_config,
    take_option,
)
from primechat.cli.output import install_guard

__all__ = ["settings", "stage", "summary"]


def settings(config: Any, simple: Sequence[str] = (), *, title: str = "") -> Any:
    """Return a namespace whose `config` is the given one, or that of --config FILE, changed by the flags."""
    install_guard()
    try:
        return SimpleNamespace(config=read_flags(config))
    except Exception as error:
        sys.exit(explain_end(error))


def read_flags(config: Any) -> Any:
    """Return a config as this script's command line has it.

    Raises:
        ConfigError: a flag has no such value.
    """
    words = sys.argv[1:]
    file = take_option(words, "--config")
    start = read_config(Path(file), type(config)) if file else config
    notes = "\n\n--config FILE starts from a saved config.json."
    return parse_flags(Path(sys.argv[0]).name, type(config), words, start, notes)


def stage(function: Callable[..., Any], config: Any, *, title: str = "") -> Any:
    """Run a stage now and return a namespace with its `result`; a failure ends the script, told once."""
    try:
        return SimpleNamespace(result=call_stage(function, config), config=config)
    except Exception as error:
        sys.exit(explain_end(error))


def summary(result: Any, *, title: str = "", notes: Sequence[str] = ()) -> None:
    """Print what came of a run."""
    import os

    result = getattr(result, "result", result)  # of a stage, or what stage() returned
    if result is not None and os.environ.get("RANK", "0") == "0":
        print("\n".join([describe_result(result), *notes]))

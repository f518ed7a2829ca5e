"""Disk use of the base directory and removal of whole runs: `primechat models --disk` and `models rm`.

Only the user's own run folders can be removed, by name or pattern; never shipped models, single steps, linked
folders, or folders that are being written (their lock is held). The shared tokenizer, caches and texts stay.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import RunDirLock
from primechat.config.names import FOLDERS
from primechat.errors import CheckpointError, ConfigError
from primechat.events import count_noun

RUN_NAME = re.compile(r"(base|mid|sft|rl)/([\w*?][\w.*?-]*)|lora:([\w*?][\w.*?-]*)(?:\+.*)?")
SHARED = {  # folders of the base directory that belong to no run, with their descriptions
    "token_cache": "token caches",
    "teacher_cache": "teachers' answers",
    "autochat": "conversations of models",
    "base_data": "text from the Hub",
    "base_data_climbmix": "text from the Hub, ClimbMix",
    "tokenizer": "shared tokenizer",
}


@dataclass(frozen=True, kw_only=True)
class RunSpace:
    """The folder of a run and the sizes of its parts in bytes."""

    name: str
    path: Path
    checkpoints: int
    optimizer: int
    snapshots: int
    other: int
    by_product: bool

    @property
    def total(self) -> int:
        """Size of the whole run in bytes."""
        return self.checkpoints + self.optimizer + self.snapshots + self.other


def measure_run(name: str, folder: Path) -> RunSpace:
    """Return the sizes of the parts of a run."""
    sizes = {"checkpoints": 0, "optimizer": 0, "snapshots": 0, "other": 0}
    for path, n_bytes in walk_sizes(folder):
        if path.parent.name == "snapshots":
            sizes["snapshots"] += n_bytes
        elif path.name.startswith("optim_"):
            sizes["optimizer"] += n_bytes
        elif path.name.startswith(("model_", "adapter_model")):
            sizes["checkpoints"] += n_bytes
        else:
            sizes["other"] += n_bytes
    return RunSpace(name=name, path=folder, by_product=registry.is_by_product(folder), **sizes)


def walk_sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield each file below a folder with its size in bytes; links inside it are not followed."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                yield path, path.lstat().st_size
            except OSError:  # removed in the meantime
                continue


def list_runs() -> list[RunSpace]:
    """Return all runs in the base directory, largest first, including those without a complete checkpoint."""
    found = []
    for family, parent in FOLDERS.items():
        place = registry.base_dir() / parent
        for folder in sorted(place.iterdir()) if place.is_dir() else []:
            if folder.is_dir() and registry.is_run(folder):
                name = f"lora:{folder.name}" if family == "lora" else f"{family}/{folder.name}"
                found.append(measure_run(name, folder))
    return sorted(found, key=lambda run: -run.total)


def measure_rest() -> dict[str, int]:
    """Return the size in bytes of everything that belongs to no run, by description."""
    base, known = registry.base_dir(), dict[str, int]()
    for path in sorted(base.iterdir()) if base.is_dir() else []:
        if path.name in FOLDERS.values():
            continue
        name = SHARED.get(path.name, "everything else")
        n_bytes = sum(n for _, n in walk_sizes(path)) if path.is_dir() else path.lstat().st_size
        known[name] = known.get(name, 0) + n_bytes
    return known


def print_disk() -> None:
    """Print the disk use of the base directory: each run by its parts, everything else, and the total."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # The table.
    runs, rest = list_runs(), measure_rest()
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("checkpoints", "optimizer", "snapshots", "other", "MB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for run in runs:
        parts = (run.checkpoints, run.optimizer, run.snapshots, run.other, run.total)
        note = "by-product of a lab" if run.by_product else "link" if run.path.is_symlink() else ""
        table.add_row(Text(run.name), *map(write_mb, parts), note)
    for name, n_bytes in rest.items():
        table.add_row(name, "", "", "", "", write_mb(n_bytes))
    total = sum(run.total for run in runs) + sum(rest.values())
    table.add_row("total", "", "", "", "", write_mb(total))
    Console(highlight=False).print(table)

    # What can be removed.
    print(
        "\n`primechat models rm NAME` removes a run; an optimizer's state is needed to resume one."
    )
    extra = [run for run in runs if run.by_product]
    if extra:
        size = write_mb(sum(run.total for run in extra))
        count = count_noun(len(extra), "by-product")
        print(f"`primechat models rm --by-products` frees {size} MB: {count} of labs.")
    print("Token caches and teachers' answers are made again when they are needed.")
    print(f"In {registry.base_dir()}{os.sep}")


def write_mb(n_bytes: int) -> str:
    """Return a size in megabytes as text."""
    return f"{n_bytes / 1e6:,.1f}"


def find_targets(names: Sequence[str], by_products: bool) -> list[RunSpace]:
    """Return the runs that match the names and patterns, each once.

    Raises:
        ConfigError: a name matches no run that may be removed.
    """
    runs = list_runs()
    chosen = [run for run in runs if by_products and run.by_product]
    for name in names:
        pattern = read_pattern(name)
        found = [run for run in runs if fnmatchcase(run.name, pattern)]
        if not found:
            there = ", ".join(run.name for run in runs[:8]) or "no run"
            raise ConfigError(
                f"{name!r} must name a run, and there is none of this name; here: {there}."
            )
        chosen += found
    linked = next((run for run in chosen if run.path.is_symlink()), None)
    if linked:
        raise ConfigError(
            f"{linked.path} is a link to {linked.path.resolve()}; remove that folder and the link yourself."
        )
    return list({run.name: run for run in chosen}.values())


def read_pattern(name: str) -> str:
    """Return a name as a pattern for the names of runs.

    Raises:
        ConfigError: it cannot match a run of the user's own.
    """
    if name.startswith("shipped/"):
        raise ConfigError(f"{name} ships with primechat and stays; name a run of your own.")
    if name.startswith("hf:"):
        raise ConfigError(
            f"{name} is another project's, in Hugging Face's cache; `hf cache` removes it there."
        )
    if name in FOLDERS:
        raise ConfigError(f"{name!r} names no single run; try {name}/TAG, or '{name}/*' for all.")
    plain, at, _ = name.partition("@")
    if at:
        raise ConfigError(f"{name} names one step, and whole runs are removed; try {plain}.")
    found = RUN_NAME.fullmatch(name)
    if not found:
        raise ConfigError(f"{name!r} must be like base/d4, sft/lab07-* or lora:pirate; correct it.")
    return f"lora:{found[3]}" if found[3] else f"{found[1]}/{found[2]}"


def remove_runs(names: Sequence[str], *, by_products: bool, yes: bool) -> int:
    """Remove runs after asking; return 1 if one could not be removed, else 0.

    Args:
        names: names and patterns of runs.
        by_products: whether to remove all by-products of labs.
        yes: whether to remove them without asking.

    Raises:
        ConfigError: a name matches no run that may be removed.
    """
    if not names and not by_products:
        raise ConfigError(
            "rm must be told what to remove; name a model, for example `primechat models rm base/d4`, or "
            "--by-products."
        )
    targets = find_targets(names, by_products)
    if not targets:
        print("There are no by-products of labs here.")
        return 0

    # Show what would be removed, and ask.
    for run in targets:
        print(f"  {run.name:40} {write_mb(run.total):>10} MB")
    for line in list_dependents(targets):
        print(f"  {line}")
    total = write_mb(sum(run.total for run in targets))
    if not yes and not ask(f"Remove {count_noun(len(targets), 'run')}, {total} MB? [y/N] "):
        print("Nothing was removed; --yes removes without asking.")
        return 0

    # Remove.
    removed = [run for run in targets if remove_run(run)]
    freed = write_mb(sum(run.total for run in removed))
    print(f"Removed {count_noun(len(removed), 'run')}, freed {freed} MB.")
    return int(len(removed) < len(targets))


def list_dependents(targets: Sequence[RunSpace]) -> Iterator[str]:
    """Yield a sentence for each adapter that stays but was trained on a run to be removed."""
    gone = {run.name for run in targets}
    for entry in registry.walk_adapters(registry.base_dir() / FOLDERS["lora"]):
        adapter, _, base = entry.identifier.partition("+")
        if adapter not in gone and base.partition("@")[0] in gone:
            yield f"{adapter} was trained on {base} and cannot be used without it."


def ask(question: str) -> bool:
    """Return whether the user answers yes; without any input, the answer is no."""
    print(question, end="", flush=True)
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line.endswith("\n"):
        print()
    return line.strip().lower() in ("y", "yes")


def remove_run(run: RunSpace) -> bool:
    """Remove the folder of a run under its lock and return whether that worked; print why if it did not."""
    try:
        with RunDirLock(run.path):
            shutil.rmtree(run.path)
    except CheckpointError as error:
        print(f"{run.name} stays: {error}", file=sys.stderr)
        return False
    except OSError as error:
        print(f"{run.name} stays in part: {error.filename}: {error.strerror}.", file=sys.stderr)
        return False
    return True

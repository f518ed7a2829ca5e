"""`primechat lab`: listing labs, opening one, and writing the Jupyter twin of each.

Hides: how a marimo file becomes a notebook that any Jupyter can open. marimo's own export writes the cells;
a first cell is added here, folded code stays folded, and everything specific to the machine is removed.
Reference: nbformat.
"""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tyro.conf import Positional

from primechat.cli.output import require_output
from primechat.cloud.export import is_folded
from primechat.errors import ConfigError, DataError
from primechat.files.paths import explain_copy, make_folder, resolve_path, write_file
from primechat.labkit import copies

ROOT, LABS = copies.ROOT, copies.LABS
FIRST_CELL = """\
# The Jupyter twin of labs/{name}.py; `primechat lab sync` writes it anew.
import sys

try:
    import primechat
except ImportError:
    raise ImportError(
        f"primechat is not installed in {{sys.executable}}. In a terminal, in the folder of primechat: "
        f"{{sys.executable}} -m pip install -e '.[labs]', then Kernel > Restart. Or choose the kernel of the "
        "environment that has it."
    ) from None
print(f"primechat {{primechat.__version__}}, Python {{sys.version.split()[0]}}: {{sys.executable}}")"""
HOW_TO_BEGIN = (
    "*In JupyterLab: press ⏩ (restart the kernel and run all cells) to bring the lab to life. "
    "`primechat lab {number}` opens a copy of your own to edit; `primechat lab reset {number}` brings the "
    "original back.*"
)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Open the labs: `primechat lab` starts JupyterLab, `primechat lab 01` opens a lab in it.

    What is opened for editing is a copy of your own in labs/mine; `primechat lab reset 01` brings the lab
    back as it ships, keeps yours as a backup and forgets its guesses.

    `primechat lab sync` writes the Jupyter twins of the labs anew, `primechat lab render OUT` writes each lab
    as a page that needs neither Python nor a network, `primechat lab render OUT 05 09` only these.
    """

    lab: Positional[str] = ""
    """Number of a lab, or reset, or sync, or render."""
    out: Positional[str] = ""
    """Of reset: the number of the lab. Of render: the folder to write."""
    only: Positional[tuple[str, ...]] = ()
    """Of render: numbers of the labs to write; none means all."""
    app: bool = False
    """Open it as an app, without code: `marimo run`."""
    edit: bool = False
    """Open your copy of it in marimo's own editor: `marimo edit`."""
    list: bool = False
    """List the labs and open none."""
    check: bool = False
    """Of sync: write nothing, and fail where a twin is out of date."""
    train: bool = False
    """Of render: run the stages too, which takes minutes."""
    own: bool = False
    """Of render: show your own models and runs too, not only the models that ship."""
    port: int = 0
    """Port of the server; 0 takes a free one."""
    headless: bool = False
    """Open no browser."""


def list_labs() -> list[Path]:
    """Return the paths of the labs, ordered by number.

    Raises:
        ConfigError: primechat was installed without its repository, which contains the labs.
    """
    if labs := sorted(LABS.glob("[0-9][0-9]_*.py")):
        return labs
    raise ConfigError(explain_copy("The labs"))


def find_lab(name: str) -> Path:
    """Return the path of a lab by its number or name.

    Raises:
        ConfigError: there is no such lab.
    """
    stem = Path(name).stem
    found = [
        lab for lab in list_labs() if stem in (lab.stem, lab.stem[:2]) or f"0{stem}" == lab.stem[:2]
    ]
    if len(found) != 1:
        there = ", ".join(path.stem[:2] for path in list_labs())
        raise ConfigError(
            f"lab={name!r} must be one of {there}; `primechat lab --list` shows their names."
        )
    return found[0]


def read_title(path: Path) -> str:
    """Return the title of a lab: its first heading."""
    found = re.search(r"mo\.md\([^#]*# (.+?)[\"')]*$", path.read_text(encoding="utf-8"), re.M)
    return found[1] if found else ""


def run_lab(config: LabConfig) -> int:
    """Run `primechat lab` and return its exit code; opening a lab replaces this process by its server.

    Raises:
        ConfigError: there is no such lab, or the labs' packages are missing.
    """
    if config.list:
        for path in list_labs():
            print(f"{path.stem[:2]}  {path.stem[3:]:24}{read_title(path)}")
        return 0
    list_labs()  # checked first, because nothing below works without labs
    require_output(False)  # everything below writes files or opens a server
    if config.lab == "sync":
        return sync_twins(check=config.check)
    if config.lab == "reset":
        return reset_lab(config.out)
    missing = [name for name in ("marimo", "jupyterlab", "anywidget") if not find_spec(name)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be installed for the labs; run {sys.executable} -m pip install -e "
            f"'.[labs]' in {ROOT}."
        )
    if config.lab == "render":
        from primechat.labkit.pages import write_pages

        if not config.out:
            raise ConfigError(
                "render needs a folder to write to; for example `primechat lab render pages`."
            )
        chosen = [find_lab(name) for name in config.only] or list_labs()
        out = resolve_path(config.out, "out", folder=True)
        return write_pages(out, chosen, train=config.train, own=config.own)
    words, environment = build_words(config, find_lab(config.lab) if config.lab else None)
    os.execve(words[0], words, environment)  # so that Ctrl-C and the exit code are the server's own


def build_words(config: LabConfig, path: Path | None) -> tuple[list[str], dict[str, str]]:
    """Return the command that opens a lab and its environment, after making the copies that it opens.

    Raises:
        ConfigError: --app or --edit is given without a lab, or labs/mine cannot be written.
    """
    # So that marimo's server finds `marimo` even if the environment is not activated.
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(places)}

    # marimo: one lab as an app, or the user's copy of it in the editor.
    if config.app or config.edit:
        if path is None:
            raise ConfigError(
                "--app and --edit open one lab; name it, for example `primechat lab 01 --app`."
            )
        kind = ["primechat.labkit.app", "run"]
        if config.edit:
            kind = ["marimo", "edit"]
            say_copy(path, ".py")
            path, said = copies.open_copy(path)
            say_conflict(said)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = config.port or probe.getsockname()[1]
        words = [sys.executable, "-m", *kind, str(path), "--port", str(port)]
        return words + ["--headless"] * config.headless, environment

    # JupyterLab: all copies are made, because its file list shows the other labs too.
    for one in list_labs():
        say_conflict(copies.open_copy(LABS / "notebooks" / f"{one.stem}.ipynb")[1])
    if path:
        say_copy(path, ".ipynb")
    where = f"/{path.stem}.ipynb" if path else ""
    words = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={LABS / 'mine'}",
        f"--LabApp.default_url=/lab/tree{where}",
        # Otherwise labs would run in an empty environment and be modified.
        "--MarimoProxyConfig.no_sandbox=True",
    ]
    words += ["--no-browser"] if config.headless else []
    # In a container, where one is root; Jupyter would refuse otherwise.
    words += ["--allow-root"] if os.geteuid() == 0 else []
    words += [f"--ServerApp.port={config.port}"] if config.port else []
    return words, environment


def say_copy(lab: Path, suffix: str) -> None:
    """Print which copy is opened, and how to discard the changes in it."""
    copy = copies.name_path(copies.find_copy(lab.with_suffix(suffix)))
    reset = f"`primechat lab reset {lab.stem[:2]}`"
    print(f"Opening {copy}, a copy of your own: edit it freely. {reset} brings the original back.")


def say_conflict(sentence: str) -> None:
    """Print the sentence about an edited copy, if there is one."""
    if sentence:
        print(sentence)


def reset_lab(name: str) -> int:
    """Restore a lab as shipped, and forget the guesses and solved exercises in it; return 0.

    Raises:
        ConfigError: no lab is named, or there is no such lab.
    """
    from primechat.labkit import memory

    if not name:
        raise ConfigError("reset needs a lab; for example `primechat lab reset 02`.")
    lab = find_lab(name)
    said = list(copies.reset_lab(lab))
    if memory.forget(lab.stem[:2]):
        said.append("Its guesses and solved exercises are forgotten.")
    print("\n".join(said or [f"There is no copy of lab {lab.stem[:2]} yet."]))
    return 0


def sync_twins(*, check: bool = False) -> int:
    """Write the notebooks; with `check`, list the stale ones and return 1 if there are any."""
    folder, stale = LABS / "notebooks", 0

    # Twins that are missing or out of date.
    twins = {folder / f"{path.stem}.ipynb": path for path in list_labs()}
    for twin, path in twins.items():
        text = write_twin(path)
        if twin.is_file() and twin.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{'out of date' if check else 'written'}: {twin.relative_to(ROOT)}")
        if not check:
            write_file(make_folder(folder) / twin.name, text)

    # Twins without a lab.
    for twin in sorted(set(folder.glob("*.ipynb")) - set(twins)):
        stale += 1
        print(f"{'has no lab' if check else 'removed'}: {twin.relative_to(ROOT)}")
        if not check:
            twin.unlink()
    if check and stale:
        print("Run `primechat lab sync` and keep what it writes.")
    return int(check and stale > 0)


def write_twin(path: Path) -> str:
    """Return the text of the Jupyter notebook of a lab.

    Raises:
        DataError: marimo cannot read the lab.
    """
    # Export the cells with marimo.
    words = [sys.executable, "-m", "marimo", "export", "ipynb", str(path), "--sort", "top-down"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    try:
        cells = json.loads(done.stdout)["cells"]
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise DataError(
            f"{path} could not be exported: marimo said {said!r}; `marimo check` tells more."
        ) from None

    # Keep code folded, and drop the import of marimo if no cell needs it.
    for cell, folded in zip(cells, read_folds(path), strict=True):
        hidden = folded and cell["cell_type"] == "code"
        cell["metadata"] = {"jupyter": {"source_hidden": True}} if hidden else {}
    if not any("mo." in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        cells = [cell for cell in cells if "".join(cell["source"]).strip() != "import marimo as mo"]

    # Below the title, explain how to start.
    for cell in cells:
        if cell["cell_type"] == "markdown":
            title, _, rest = "".join(cell["source"]).partition("\n")
            begin = HOW_TO_BEGIN.format(number=path.stem[:2])
            cell["source"] = f"{title}\n\n{begin}\n{rest}".rstrip().splitlines(keepends=True)
            break

    # The first cell checks that primechat is installed.
    first = {
        "cell_type": "code",
        "execution_count": None,
        "id": "start",
        "outputs": [],
        "metadata": {"jupyter": {"source_hidden": True}},
        "source": FIRST_CELL.format(name=path.stem).splitlines(keepends=True),
    }
    notebook = {
        "cells": [first, *cells],
        "metadata": {
            "kernelspec": KERNEL,
            "language_info": {"name": "python", "file_extension": ".py"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def read_folds(path: Path) -> list[bool]:
    """Return for each cell of a lab whether its code is folded."""
    folds = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        marks = getattr(node, "decorator_list", [])
        if isinstance(node, ast.With):
            marks = [node.items[0].context_expr]
        folds += [is_folded(mark) for mark in marks if ast.unparse(mark).startswith("app.")]
    return folds

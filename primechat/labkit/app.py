"""marimo's server for one lab, which reads what the lab imports while the browser still loads the page.

Hides: that an app's cells run in the server's own process, so that a first import of ipywidgets and numpy
would keep the page waiting after it has loaded marimo. Reference: `marimo run`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the packages
IMPORT = r"^(?:from|import) ([\w.]+)(?: import (\([^)]*\)|.*))?"


def find_source(name: str) -> Path | None:
    """Return the file of a module of primechat; None where there is no such module."""
    base = ROOT.joinpath(*name.split("."))
    found = (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())
    return next(found, None) if name.startswith("primechat") else None


def read_imports(name: str) -> list[str]:
    """Return what a module of primechat imports when it is imported: the names at its text's left margin."""
    if (path := find_source(name)) is None:
        return []
    found = re.findall(IMPORT, path.read_text(encoding="utf-8"), re.M)
    inner = [f"{module}.{word}" for module, words in found for word in re.findall(r"\w+", words)]
    return [module for module, _ in found] + [name for name in inner if find_source(name)]


@functools.cache
def needs_torch(name: str) -> bool:
    """Tell whether importing a module imports torch."""
    return "torch" in name.split(".") or any(needs_torch(inner) for inner in read_imports(name))


@functools.cache
def import_light(name: str) -> None:
    """Import a module, or what it imports where it needs torch: marimo waits for an import of torch that is
    under way before it shows a word, and alone it takes seconds. An import that is broken off would leave
    half a module to a cell that asks for it in that moment, so none is begun.
    """
    if needs_torch(name):
        for inner in read_imports(name):
            import_light(inner)
        return
    with contextlib.suppress(Exception):  # the cell that imports it says what is wrong
        importlib.import_module(name)


def read_ahead(path: Path, port: int) -> None:
    """Import what a lab's cells import, all but torch, once the server answers."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)
    for name in re.findall(r"^ +(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.M):
        import_light(name)


if __name__ == "__main__":  # `run LAB --port PORT` and whatever words follow
    given = (Path(sys.argv[2]), int(sys.argv[4]))
    threading.Thread(target=read_ahead, args=given, daemon=True).start()
    runpy.run_module("marimo", run_name="__main__", alter_sys=True)

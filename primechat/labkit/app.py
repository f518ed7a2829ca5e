"""marimo's server for one lab, which imports the lab's packages while the browser is still loading the page.

The cells of an app run in the server's own process. Without this, the first import of ipywidgets and numpy
would keep the page waiting after the browser has loaded marimo. Reference: `marimo run`.
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

ROOT = Path(__file__).resolve().parents[2]  # folder that holds the package
IMPORT = r"^(?:from|import) ([\w.]+)(?: import (\([^)]*\)|.*))?"


def find_source(name: str) -> Path | None:
    """Return the file of a module of primechat, or None if there is no such module."""
    base = ROOT.joinpath(*name.split("."))
    found = (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file())
    return next(found, None) if name.startswith("primechat") else None


def read_imports(name: str) -> list[str]:
    """Return the modules that a module of primechat imports at its top level."""
    if (path := find_source(name)) is None:
        return []
    found = re.findall(IMPORT, path.read_text(encoding="utf-8"), re.M)
    inner = [f"{module}.{word}" for module, words in found for word in re.findall(r"\w+", words)]
    return [module for module, _ in found] + [name for name in inner if find_source(name)]


@functools.cache
def needs_torch(name: str) -> bool:
    """Return whether importing a module imports torch."""
    return "torch" in name.split(".") or any(needs_torch(inner) for inner in read_imports(name))


@functools.cache
def import_light(name: str) -> None:
    """Import a module, or, if it needs torch, only those of its imports that do not.

    An import of torch takes seconds, and marimo shows nothing while one is under way. It is never started,
    because breaking it off would leave a half-imported module to a cell that needs it at that moment.
    """
    if needs_torch(name):
        for inner in read_imports(name):
            import_light(inner)
        return
    with contextlib.suppress(Exception):  # the cell that imports it shows the error
        importlib.import_module(name)


def read_ahead(path: Path, port: int) -> None:
    """Import what the cells of a lab import, except torch, once the server answers."""
    # Wait for the server.
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)

    # Import what the cells do.
    for name in re.findall(r"^ +(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.M):
        import_light(name)


if __name__ == "__main__":  # called with `run LAB --port PORT ...`
    given = (Path(sys.argv[2]), int(sys.argv[4]))
    threading.Thread(target=read_ahead, args=given, daemon=True).start()
    runpy.run_module("marimo", run_name="__main__", alter_sys=True)

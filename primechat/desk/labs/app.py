"""marimo's server for one lab, which reads what the lab imports while the browser still loads the page.

Hides: that an app's cells run in the server's own process, so that a first import of ipywidgets and numpy
would keep the page waiting after it has loaded marimo. Reference: `marimo run`.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import runpy
import socket
import sys
import threading
import time
from pathlib import Path


class Refusal:
    """Keeps torch from one thread: marimo waits for an import of it that is under way before it shows a word,
    and alone it takes seconds.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, *_: object) -> None:
        """Find nothing; raise ImportError where this thread asks for torch."""
        if name == "torch" and threading.get_ident() == self.thread:
            raise ImportError("torch is left to the cell that needs it.")


def read_ahead(path: Path, port: int) -> None:
    """Import what a lab's cells import, all but torch, once the server answers."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)
    sys.meta_path.insert(0, Refusal())  # type: ignore[arg-type]
    for name in re.findall(r"^ +(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.M):
        with contextlib.suppress(Exception):  # the cell that imports it says what is wrong
            importlib.import_module(name)


if __name__ == "__main__":  # `run LAB --port PORT` and whatever words follow
    given = (Path(sys.argv[2]), int(sys.argv[4]))
    threading.Thread(target=read_ahead, args=given, daemon=True).start()
    runpy.run_module("marimo", run_name="__main__", alter_sys=True)

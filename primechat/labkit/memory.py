"""Memory of the reader's guesses and solved exercises between two openings of a lab.

It is one small JSON file in the base directory, keyed by the number of the lab; `primechat lab reset` clears
the entries of a lab. Only what somebody does in a notebook is kept: scripts, tests and rendered pages neither
read nor write it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from primechat.checkpoint import registry
from primechat.files.paths import parse_json, write_whole
from primechat.labkit import start_stop
from primechat.views.widgets.controls import ExerciseCard, Prediction

_lock = threading.Lock()


def find_file() -> Path:
    """Return the path of the memory file; it may not exist."""
    return registry.base_dir() / "labs.json"


def name_lab(variables: Mapping[str, Any]) -> str:
    """Return the number of the lab whose cell has these global variables, or its name if it has no number.

    >>> name_lab({"__file__": "/labs/mine/02_attention_internals.ipynb"}), name_lab({"__file__": "/a/own.py"})
    ('02', 'own')
    """
    path = variables.get("__file__") or os.environ.get("JPY_SESSION_NAME") or ""
    stem = Path(str(path)).stem
    return stem[:2] if stem[:2].isdigit() else stem


def read_all() -> dict[str, Any]:
    """Return everything remembered, by lab; empty if the file is missing or damaged."""
    try:
        found = parse_json(find_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recall(lab: str, kind: str, name: str) -> Any:
    """Return what is remembered about a question or exercise, or None."""
    if not is_wanted():
        return None
    part: Any = read_all()
    for key in (lab, kind, name):
        part = part.get(key) if isinstance(part, dict) else None
    return part


def keep(lab: str, kind: str, name: str, value: Any) -> None:
    """Store a value for a question or exercise; errors of the disk are ignored."""
    if not is_wanted():
        return
    with _lock, suppress(OSError):
        known = read_all()
        part: Any = known
        for key in (lab, kind):
            part[key] = part[key] if isinstance(part.get(key), dict) else {}
            part = part[key]
        part[name] = value
        write_all(known)


def forget(lab: str) -> bool:
    """Clear the entries of a lab; return whether there were any."""
    with _lock:
        known = read_all()
        if known.pop(lab, None) is None:
            return False
        write_all(known)
        return True


def write_all(known: dict[str, Any]) -> None:
    """Write the memory file."""
    find_file().parent.mkdir(parents=True, exist_ok=True)
    write_whole(find_file(), json.dumps(known, indent=1, ensure_ascii=False).encode())


def is_wanted() -> bool:
    """Return whether this runs in a notebook that somebody is working in."""
    return start_stop.in_notebook() and not start_stop.still


def follow_guess(card: Prediction, lab: str) -> None:
    """Restore an earlier guess on a card, and store the next one when it is revealed."""
    card.recall(recall(lab, "guesses", card.question))

    def note(change: Any) -> None:
        if card.revealed and card.guess is not None:
            keep(lab, "guesses", card.question, card.guess)

    card.observe(note, ["revealed"])


def follow_exercise(card: ExerciseCard, lab: str, source: str) -> None:
    """Store the code that solved an exercise, or show the stored code on an untried card."""
    if card.state == "passed":
        keep(lab, "exercises", card.title, source)
        return
    known = recall(lab, "exercises", card.title)
    if card.state == "untried" and isinstance(known, str):
        card.state, card.kept = "solved", known
        card.message = "You have solved this before."

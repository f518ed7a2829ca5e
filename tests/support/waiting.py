"""Waiting for a state instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], bool]) -> None:
    """Return as soon as a condition is true; fail after 20 seconds."""
    t_end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < t_end, "it did not come to pass"
        time.sleep(0.01)

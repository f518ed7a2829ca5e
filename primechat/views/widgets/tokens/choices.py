"""The tokenizers that a page may choose among, each opened when it is first needed.

Hides: when a tokenizer is read, and the table of how many bytes each of its tokens has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A tokenizer to choose: a key, what to call it, the context to count against, how to open it."""

    key: str
    label: str
    context: int
    open: Callable[[], Any]


class Opened:
    """Tokenizers that are open, each opened once."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = {choice.key: choice for choice in choices}
        self.on_change: list[Callable[[], None]] = []
        self._open: dict[str, Any] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._faults: dict[str, Exception] = {}
        self._lengths: dict[str, np.ndarray] = {}

    def get(self, key: str, wait_s: float | None = None) -> Any:
        """Return a tokenizer by its key, opening it on a thread.

        Raises:
            TimeoutError: It is not open within `wait_s` seconds; the opening goes on.
        """
        if key not in self._open:
            if key not in self._threads:
                self._threads[key] = threading.Thread(target=self._work, args=(key,), daemon=True)
                self._threads[key].start()
            self._threads[key].join(wait_s)
            if self._threads[key].is_alive():
                raise TimeoutError(
                    f"Opening {self.choices[key].label}. The first time this takes a while."
                )
            del self._threads[key]
            if key in self._faults:
                raise self._faults.pop(key)
        return self._open[key]

    def _work(self, key: str) -> None:
        try:
            self._open[key] = self.choices[key].open()
        except Exception as error:  # raised again by `get`; the next one tries anew
            self._faults[key] = error

    def add(self, choice: Choice) -> None:
        """Offer one more, or another under a key that is there; the pages that show them hear of it."""
        self.choices[choice.key] = choice
        self._open.pop(choice.key, None)
        self._lengths.pop(choice.key, None)
        for callback in self.on_change:
            callback()

    def cut(
        self, key: str, text: str, wait_s: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths in bytes of a text's tokens: int32 (N,), int32 (N,)."""
        encoder = self.get(key, wait_s)
        ids = np.asarray(encoder.encode(text), dtype=np.int32)
        if key not in self._lengths:
            sizes = (len(encoder.token_bytes(i)) for i in range(encoder.vocab_size))
            self._lengths[key] = np.fromiter(sizes, np.int32, encoder.vocab_size)
        lengths = self._lengths[key][ids]
        if int(lengths.sum()) != len(text.encode("utf-8", "replace")):
            raise ValueError(
                f"{self.choices[key].label} rewrites the text before it cuts it, so its {len(ids):,} tokens "
                "cannot be drawn over it; choose another."
            )
        return ids, lengths

    def describe(self) -> list[list[Any]]:
        """Return what the page needs to offer the choices: key, label, context."""
        return [[choice.key, choice.label, choice.context] for choice in self.choices.values()]

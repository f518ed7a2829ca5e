"""The playground: type, and see the text cut into tokens; compare up to three tokenizers.

Hides: what goes over the wire. The page sends each edit and gets back, for each tokenizer shown, the run of
tokens that changed: ids and lengths in bytes. The page knows the text and places the chips itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets

from primechat.views.widgets.kit import Widget
from primechat.views.widgets.tokens.choices import Opened

MAX_SHOWN = 3


def find_change(old: np.ndarray, new: np.ndarray) -> tuple[int, int]:
    """Return (at, cut): `old[at : at + cut]` is all that differs, the rest stands at both ends of `new`."""
    shared = min(len(old), len(new))
    differ = np.flatnonzero(old[:shared] != new[:shared])
    at = int(differ[0]) if len(differ) else shared
    rest = shared - at
    differ = np.flatnonzero(old[len(old) - rest :][::-1] != new[len(new) - rest :][::-1])
    tail = int(differ[0]) if len(differ) else rest
    return at, len(old) - at - tail


class Playground(Widget):
    """Chips under the caret, bytes, counts and cost; `text` follows the page when typing pauses."""

    text = traitlets.Unicode().tag(sync=True)
    shown = traitlets.List(traitlets.Unicode()).tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    start = traitlets.Dict().tag(sync=True)

    def __init__(self, opened: Opened, text: str, shown: Sequence[str]) -> None:
        super().__init__(text=text, shown=list(shown), choices=opened.describe())
        self._opened = opened
        self._draft, self._revision = b"", 0
        self._ids: dict[str, np.ndarray] = {}
        opened.on_change.append(lambda: setattr(self, "choices", opened.describe()))
        self.start = {**self.answer_open(text, list(shown), wait_s=None), "text": text}

    def answer_open(
        self, text: str, shown: list[str], wait_s: float | None = 0.3
    ) -> dict[str, Any]:
        """Take a whole text and the tokenizers to show it with; answer all of their tokens.

        One that is not open within `wait_s` seconds is answered as pending: the page asks again.
        """
        self._draft = text.encode("utf-16-le", "surrogatepass")
        self._ids = {}
        return self._answer(text, shown, wait_s)

    def answer_edit(
        self, revision: int, at: int, cut: int, put: str, shown: list[str]
    ) -> dict[str, Any]:
        """Take an edit, counted in the page's UTF-16 units; answer the tokens that changed."""
        if revision != self._revision:
            return {
                "stale": True
            }  # another view of this widget has edited since: the page sends its text
        end = 2 * (at + cut)
        self._draft = (
            self._draft[: 2 * at] + put.encode("utf-16-le", "surrogatepass") + self._draft[end:]
        )
        return self._answer(self._draft.decode("utf-16-le", "replace"), shown, 0.0)

    def _answer(self, text: str, shown: list[str], wait_s: float | None) -> dict[str, Any]:
        self._revision += 1
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        panes = [self._cut_pane(key, text, wait_s) for key in shown[:MAX_SHOWN]]
        return {"revision": self._revision, "panes": panes}

    def _cut_pane(self, key: str, text: str, wait_s: float | None) -> dict[str, Any]:
        try:
            ids, lengths = self._opened.cut(key, text, wait_s)
        except Exception as error:  # offline, damaged, refused: the other panes go on
            self._ids.pop(key, None)
            pending = type(error) is TimeoutError
            return {"key": key, "fault": str(error) or type(error).__name__, "pending": pending}
        whole = key not in self._ids
        old = self._ids.get(key, np.empty(0, np.int32))
        at, cut = find_change(old, ids)
        self._ids[key] = ids
        put = slice(at, len(ids) - (len(old) - at - cut))
        size = self._opened.get(key).vocab_size
        return {
            "key": key,
            "whole": whole,
            "at": at,
            "cut": cut,
            "ids": ids[put].tolist(),
            "sizes": lengths[put].tolist(),
            "vocab_size": size,
        }

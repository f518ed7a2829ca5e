"""The merge replay: a slider plays the merges that turn the bytes of a text into its tokens.

Hides: nothing of the merges; it draws what a function gives it, and that each step is played in the page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget
from primechat.views.widgets.tokens.choices import Opened

MAX_CHARS = 600  # longer texts are cut for this view: one would not find the place that merges


class MergeReplay(Widget):
    """Bytes become tokens, merge by merge; `text` and `key` are what is played."""

    text = traitlets.Unicode().tag(sync=True)
    key = traitlets.Unicode().tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self, opened: Opened, play: Callable[[Any, str], dict[str, Any]], text: str, key: str
    ) -> None:
        """Show a replay.

        Args:
            opened: the tokenizers; those that keep no merges cannot be chosen.
            play: returns of a tokenizer and a text `data` (byte values), `pieces`, `removed_at`, `steps`
                (rank, left bytes, right bytes, places), and `ids`, what encode returns.
        """
        super().__init__(text=text, key=key, choices=opened.describe())
        self._opened, self._play = opened, play
        opened.on_change.append(lambda: setattr(self, "choices", opened.describe()))
        self.start = self.answer_play(key, text)

    def answer_play(self, key: str, text: str) -> dict[str, Any]:
        """Return the replay of a text."""
        return {**self._play(self._opened.get(key), text[:MAX_CHARS]), "text": text, "key": key}

"""A conversation as the model reads it: special tokens between the messages, what is learned lit.

Hides: nothing of the format; a function renders the conversation, this draws it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class ChatFormat(Widget):
    """Build a conversation and see its tokens; `messages` is what the page has built."""

    messages: Any = traitlets.List().tag(sync=True)
    formats: Any = traitlets.List().tag(sync=True)
    key = traitlets.Unicode().tag(sync=True)
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        keys: list[tuple[str, str, int]],
        draw: Callable[[str, list[dict[str, Any]], int], dict[str, Any]],
        messages: list[dict[str, Any]],
    ) -> None:
        """Show a conversation.

        Args:
            keys: tokenizers with chat tokens: (key, label, context).
            draw: returns `ids`, `mask`, `pieces` (bytes of each token), `special` (1 where it is one) and
                `cut` (tokens beyond the context) for a key, messages and a most number of tokens.
        """
        first = keys[0][0] if keys else ""
        super().__init__(formats=[list(key) for key in keys], key=first, messages=messages)
        self._draw = draw
        self.start = self.answer_draw(self.key, messages, keys[0][2]) if keys else {}

    def answer_draw(
        self, key: str, messages: list[dict[str, Any]], max_tokens: int
    ) -> dict[str, Any]:
        """Render a conversation."""
        return self._draw(key, messages, max_tokens)

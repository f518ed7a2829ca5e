"""A shelf of dialogue sets: read their conversations with what is learned from lit, and weigh a mixture.

Hides: how weights become the text of a mixture. Reference: primechat.text.dialogues, which reads that text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class MixDesk(Widget):
    """Cards of dialogue sets with a weight each; `mixture` is the text that the stages read.

    Args:
        sets: dicts of name, about, licence, warning, here, megabytes, conversations, messages and tokens (of
            sets that are here).
        read: returns a conversation of a set: (name, number) -> dict of parts, each with role and pieces
            [text, learned].
    """

    sets: Any = traitlets.List().tag(sync=True)
    weights: Any = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        sets: Sequence[dict[str, Any]],
        read: Callable[[str, int], dict[str, Any]],
        weights: dict[str, float],
    ) -> None:
        self.read = read
        super().__init__(sets=list(sets), weights=dict(weights), chosen=next(iter(weights)))

    @property
    def mixture(self) -> str:
        """The mixture as `finetune` takes it: `chitchat, faq*2`."""
        parts = (
            (name, float(weight)) for name, weight in self.weights.items() if float(weight) > 0
        )
        return ", ".join(name if weight == 1 else f"{name}*{weight:g}" for name, weight in parts)

    def answer_read(self, name: str, number: int) -> dict[str, Any]:
        """Return one conversation for the page."""
        return self.read(name, number)

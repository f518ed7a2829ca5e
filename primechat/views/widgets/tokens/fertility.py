"""What the same words cost in other languages and in code, for up to three tokenizers.

Hides: nothing; the page counts characters as people see them, this counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget
from primechat.views.widgets.tokens.choices import Opened


class FertilityTable(Widget):
    """A table of passages, one bar a tokenizer; a row opens to its chips."""

    passages: Any = traitlets.List().tag(sync=True)
    shown: Any = traitlets.List().tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self, opened: Opened, passages: Sequence[tuple[str, str, str]], shown: Sequence[str]
    ) -> None:
        """Show passages (name, group, text); the first is what the others are compared with."""
        super().__init__(
            passages=[list(p) for p in passages], shown=list(shown), choices=opened.describe()
        )
        self._opened = opened
        opened.on_change.append(lambda: setattr(self, "choices", opened.describe()))
        self.start = {
            "columns": [self.answer_measure(key) for key in shown[:1]]
        }  # the rest when it is seen

    def answer_measure(self, key: str) -> dict[str, Any]:
        """Return the tokens' lengths in bytes of each passage."""
        try:
            cuts = [self._opened.cut(key, text)[1].tolist() for _, _, text in self.passages]
        except Exception as error:  # offline, damaged: the other columns stand
            return {"key": key, "fault": str(error) or type(error).__name__}
        return {"key": key, "cuts": cuts}

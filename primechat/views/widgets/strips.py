"""A conversation as a heat strip: a column a turn, a row a measure; a cell opens the turn it stands for.

Hides: the colours. All groups share one scale a row, so that a control can be compared at a glance.
Reference: primechat.metrics.loops, MEASURES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class TalkStrips(Widget):
    """Conversations to look through.

    Args:
        rows: for each measure, {"name", "about", "full"}: full is the value of the strongest colour.
        groups: {"name", "about", "talks"}; a talk is {"title", "loop", "turns"}, and a turn {"who", "text",
            "values": one a row or None, "tokens": [text, entropy, probability, rank] each}.
        rest: return all groups, where `groups` has some without talks: so the first is seen before the others
            are measured.
    """

    rows: Any = traitlets.List().tag(sync=True)
    groups: Any = traitlets.List().tag(sync=True)

    def __init__(
        self, rows: list[Any], groups: list[Any], rest: Callable[[], Any] | None = None
    ) -> None:
        self.rest = rest or (lambda: groups)
        super().__init__(rows=rows, groups=groups)

    def answer_settle(self) -> dict[str, Any]:
        """Bring the groups that are not there yet."""
        self.groups = self.rest()
        return {}

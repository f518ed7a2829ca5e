"""A conversation as a heat strip: one column per turn, one row per measure; a cell opens its turn.

Hides: the colours. All groups share one scale per row, so that a control can be compared at a glance.
Reference: primechat.metrics.loops, MEASURES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class TalkStrips(Widget):
    """Heat strips of conversations to browse.

    Args:
        rows: for each measure, {"name", "about", "full"}, where full is the value of the strongest colour.
        groups: {"name", "about", "talks"}; a talk is {"title", "loop", "turns"}, and a turn {"who", "text",
            "values": one per row or None, "tokens": list of [text, entropy, probability, rank]}.
        rest: returns all groups if `groups` still lacks the talks of some, so that the first group is shown
            before the others are measured.
    """

    rows: Any = traitlets.List().tag(sync=True)
    groups: Any = traitlets.List().tag(sync=True)

    def __init__(
        self, rows: list[Any], groups: list[Any], rest: Callable[[], Any] | None = None
    ) -> None:
        self.rest = rest or (lambda: groups)
        super().__init__(rows=rows, groups=groups)

    def answer_settle(self) -> dict[str, Any]:
        """Fetch the groups that are still missing."""
        self.groups = self.rest()
        return {}

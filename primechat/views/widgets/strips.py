"""A conversation as a heat strip: a column a turn, a row a measure; a cell opens the turn it stands for.

Hides: the colours. All groups share one scale a row, so that a control can be compared at a glance.
Reference: primechat.metrics.loops, MEASURES.
"""

from __future__ import annotations

from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class TalkStrips(Widget):
    """Conversations to look through.

    Args:
        rows: for each measure, {"name", "about", "full"}: full is the value of the strongest colour.
        groups: {"name", "about", "talks"}; a talk is {"title", "loop", "turns"}, and a turn {"who", "text",
            "values": one a row or None, "tokens": [text, entropy, probability, rank] each}.
    """

    rows: Any = traitlets.List().tag(sync=True)
    groups: Any = traitlets.List().tag(sync=True)

    def __init__(self, rows: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        super().__init__(rows=rows, groups=groups)

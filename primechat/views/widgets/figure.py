"""A plotly figure that is drawn late: after a guess, or when the reader scrolls to it.

Hides: when the figure is made, and how plotly's script of 4 MB is loaded: the page requests it once, when the
first figure is to be drawn. Reference: plotly.js, `newPlot`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class WaitingFigure(Widget):
    """A plotly figure, or a function that returns one and is called once, when the figure is needed."""

    figure = traitlets.Dict().tag(sync=True)  # as plotly.js takes it; empty until it is needed
    # Height that is reserved for it, so that nothing on the page moves.
    height = traitlets.Int(330).tag(sync=True)

    def __init__(self, figure: Any) -> None:
        self.make: Callable[[], Any] = figure if callable(figure) else lambda: figure
        known = None if callable(figure) else figure.layout.height
        super().__init__(height=int(known or 330))

    def answer_settle(self) -> dict[str, Any]:
        """Return the figure, made at the first call."""
        self.figure = self.figure or json.loads(self.make().to_json())
        return {"figure": self.figure}

    def answer_script(self) -> dict[str, Any]:
        """Return plotly's script."""
        from plotly.offline import get_plotlyjs

        return {"script": get_plotlyjs()}

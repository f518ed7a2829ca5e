"""A plotly figure that waits: for a guess, or until the reader comes to it.

Hides: when it is made, and where plotly's script of 4 MB comes from: the page asks for it once, and not
before a figure is to be drawn. Reference: plotly.js, `newPlot`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class WaitingFigure(Widget):
    """A plotly figure, or a function that returns one and is called when it is wanted, once."""

    figure = traitlets.Dict().tag(sync=True)  # as plotly.js takes it; empty until it is wanted
    height = traitlets.Int(330).tag(
        sync=True
    )  # of the room that is kept for it, so that nothing moves

    def __init__(self, figure: Any) -> None:
        self.make: Callable[[], Any] = figure if callable(figure) else lambda: figure
        known = None if callable(figure) else figure.layout.height
        super().__init__(height=int(known or 330))

    def answer_settle(self) -> dict[str, Any]:
        """Make the figure, if it is not made yet."""
        self.figure = self.figure or json.loads(self.make().to_json())
        return {"figure": self.figure}

    def answer_script(self) -> dict[str, Any]:
        """Return plotly's script."""
        from plotly.offline import get_plotlyjs

        return {"script": get_plotlyjs()}

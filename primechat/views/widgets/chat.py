"""The chat's page: a picker, the conversation as a tree, and a line to write in.

Hides: nothing of the model. Everything that the page wants done goes to `act`, and what is written comes by
`push`; the page keeps no state that it could not ask for again. Model text is drawn by `markdown.js`, which
makes nodes and never HTML. Reference: primechat.chat.session, which answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class ChatView(Widget):
    """A page to chat on. `act` is called with the name of what the reader did and its details, and returns
    what the page needs; `first` is shown before Python has time to answer, as `act("ready")` returns it.
    """

    height = traitlets.Unicode("74vh").tag(sync=True)
    first = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        act: Callable[[str, dict[str, Any]], dict[str, Any]],
        *,
        height: str = "74vh",
        first: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(height=height, first=first or {})
        self._act = act

    def answer_act(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Pass on what the reader did."""
        return self._act(name, given)

    def push(self, message: dict[str, Any]) -> bool:
        """Send the page a message; return False once nobody can hear it."""
        comm = self.comm
        if comm is None or getattr(comm, "_closed", False):
            return False
        self.send({"push": message})
        return True

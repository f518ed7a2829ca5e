"""The chat page: a model picker, the conversation as a tree, and an input line.

Every request of the page goes to `act`, and replies arrive through `push`; the page keeps no state that it
could not request again. Model text is drawn by `markdown.js`, which creates nodes and never HTML.
Reference: primechat.chat.session, which answers the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class ChatView(Widget):
    """A page to chat on.

    Args:
        act: called with the name and arguments of each request; returns the answer.
        height: CSS height of the page.
        first: answer to the request "ready", shown before Python has time to answer.
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
        """Pass a request of the page to `act` and return the answer."""
        return self._act(name, given)

    def push(self, message: dict[str, Any]) -> bool:
        """Send a message to the page; return False once the page is gone."""
        comm = self.comm
        if comm is None or getattr(comm, "_closed", False):
            return False
        self.send({"push": message})
        return True

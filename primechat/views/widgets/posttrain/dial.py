"""An adapter's dial: the same question answered by the base and by the adapted model as you drag.

Hides: nothing; the replies come from a function. Reference: primechat.model.lora, `set_adapter_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class DialDesk(Widget):
    """A prompt, a dial from 0 to 2, and two replies side by side.

    Args:
        write: returns a reply: (prompt, dial, adapter) -> text; dial 0 is the base.
        adapters: names to choose from; none shows `waiting` alone.
        waiting: a sentence shown where there is no adapter yet.
    """

    adapters: Any = traitlets.List().tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    waiting = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        write: Callable[[str, float, str], str],
        adapters: Sequence[str],
        prompt: str,
        waiting: str = "",
    ) -> None:
        self.write = write
        super().__init__(adapters=list(adapters), prompt=prompt, waiting=waiting)

    def answer_write(self, prompt: str, dial: float, adapter: str) -> dict[str, Any]:
        """Return a reply for the page."""
        return {"text": self.write(prompt[:2000], min(2.0, max(0.0, float(dial))), adapter)}

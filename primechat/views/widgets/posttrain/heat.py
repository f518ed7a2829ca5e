"""A reply whose tokens are tinted by how far a student is from its teacher there.

Hides: nothing; the numbers come from a function. Reference: primechat.metrics.retention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class HeatText(Widget):
    """A prompt and a reply; each token tells its distance and both models' likeliest tokens. `measure`
    returns what is shown: prompt -> {"tokens": [{"text", "kl", "teacher", "student"}, ...]}.
    """

    prompt = traitlets.Unicode("").tag(sync=True)

    def __init__(self, measure: Callable[[str], dict[str, Any]], prompt: str) -> None:
        self.measure = measure
        super().__init__(prompt=prompt)

    def answer_measure(self, prompt: str) -> dict[str, Any]:
        """Return the tokens of the teacher's reply for the page."""
        return self.measure(prompt[:2000])

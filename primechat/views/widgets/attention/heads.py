"""The prompt, and all heads at work on it.

Hides: nothing; the page's part stands in heads.js. Reference: Vig 2019 (BertViz).
"""

from __future__ import annotations

import traitlets

from primechat.views.widgets.kit import Widget


class PromptBar(Widget):
    """A text for the model to read; `text` is the reader's."""

    kind = traitlets.Unicode("prompt").tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)


class HeadView(Widget):
    """What every head reads; `head`, `at` and `control` are the reader's.

    `thumbs` holds uint8 (L, H, side, side), `pattern` uint16 (T, T): weights times the largest integer.
    """

    kind = traitlets.Unicode("heads").tag(sync=True)
    tokens: traitlets.List = traitlets.List().tag(sync=True)
    data = traitlets.Dict().tag(sync=True)  # n_layer, n_head, side
    thumbs = traitlets.Bytes().tag(sync=True)
    pattern = traitlets.Bytes().tag(sync=True)
    head = traitlets.List([0, 0]).tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)
    control = traitlets.Bool(False).tag(sync=True)

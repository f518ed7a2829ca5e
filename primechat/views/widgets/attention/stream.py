"""The residual stream: lens, attribution, patching, and the time machine.

Hides: nothing; the page's part stands in stream.js. Reference: nostalgebraist 2020; Elhage et al. 2021.
"""

from __future__ import annotations

import traitlets

from primechat.views.widgets.kit import Widget


class LensView(Widget):
    """The next token at every stage and place; `at` and `control` are the reader's."""

    kind = traitlets.Unicode("lens").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)  # tokens, stages, cells (R, T) of top, bits, target
    at = traitlets.Int(0).tag(sync=True)
    control = traitlets.Bool(False).tag(sync=True)


class ShareView(Widget):
    """What each part adds to a token's logit; `at` and `token` are the reader's."""

    kind = traitlets.Unicode("shares").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)
    opened = traitlets.Bool(False).tag(sync=True)


class PatchView(Widget):
    """States carried between two prompts; `clean` and `corrupt` are the reader's."""

    kind = traitlets.Unicode("patch").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    clean = traitlets.Unicode().tag(sync=True)
    corrupt = traitlets.Unicode().tag(sync=True)
    opened = traitlets.Bool(False).tag(sync=True)


class TimeView(Widget):
    """A run's snapshots under one slider; `moment` (an index of `steps`) and `at` are the reader's."""

    kind = traitlets.Unicode("time").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    thumbs = traitlets.Bytes().tag(sync=True)
    steps: traitlets.List = traitlets.List().tag(sync=True)
    moment = traitlets.Int(0).tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)
    opened = traitlets.Bool(False).tag(sync=True)

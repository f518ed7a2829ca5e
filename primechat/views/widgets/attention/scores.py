"""What heads are like, with a control, and one attention score taken apart.

Hides: nothing; the page's part stands in scores.js. Reference: Olsson et al. 2022; Vig 2019 (neuron view).
"""

from __future__ import annotations

import traitlets

from primechat.views.widgets.kit import Widget


class ScoreView(Widget):
    """A strip for each score, a dot for each head; `head` is the reader's."""

    kind = traitlets.Unicode("scores").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    head = traitlets.List([0, 0]).tag(sync=True)
    opened = traitlets.Bool(False).tag(sync=True)


class NeuronView(Widget):
    """Query, key and their product, channel by channel; `key` is the reader's."""

    kind = traitlets.Unicode("neurons").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    key = traitlets.Int(0).tag(sync=True)
    opened = traitlets.Bool(False).tag(sync=True)

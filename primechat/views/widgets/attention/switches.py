"""Switches for heads and MLPs.

Hides: nothing; the page's part stands in switches.js. Reference: Michel et al. 2019.
"""

from __future__ import annotations

import traitlets

from primechat.views.widgets.kit import Widget


class SwitchView(Widget):
    """A board of switches and what the model loses; `off`, `at`, `test` and `wish` are the reader's.

    `wish` grows when the page wants the next slice of the trial of each part alone; -1 ends it.
    """

    data = traitlets.Dict().tag(sync=True)
    off: traitlets.List = traitlets.List().tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)
    test = traitlets.Unicode("text").tag(sync=True)
    wish = traitlets.Int(0).tag(sync=True)

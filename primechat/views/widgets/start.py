"""The cards of the first lab: the machine and its models, a check of a model, and downloads.

Nothing is computed here. A card shows the data and calls the functions that it is given; results come from
other threads and are set as traits. Reference: primechat.cli.check, primechat.cli.download.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget


class MachineCard(Widget):
    """The installed packages, the hardware, and the models on the machine.

    `rows` are (name, value, remark) and `models` are dicts of identifier, about and where; `find` returns
    current values of both.
    """

    kind = traitlets.Unicode("machine").tag(sync=True)
    rows: Any = traitlets.List().tag(sync=True)
    models: Any = traitlets.List().tag(sync=True)
    place = traitlets.Unicode("").tag(sync=True)

    def __init__(self, find: Callable[[], dict[str, Any]]) -> None:
        self.find = find
        super().__init__(**find())

    def answer_find(self) -> dict[str, Any]:
        """Look again."""
        for name, value in self.find().items():
            setattr(self, name, value)
        return {}


class CheckCard(Widget):
    """A check whether a model is complete and matches its tokenizer.

    `report` has a verdict, a sentence, rows of (name, text), bars of (name, bits per byte, whether it is the
    model) and a sample; `state` is ready, running, done or failed. `find` returns the current list of models.
    """

    kind = traitlets.Unicode("check").tag(sync=True)
    models: Any = traitlets.List().tag(sync=True)
    state = traitlets.Unicode("ready").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    report: Any = traitlets.Dict().tag(sync=True)

    def __init__(
        self, find: Callable[[], list[str]], check: Callable[[CheckCard, str], None]
    ) -> None:
        self.find, self.check = find, check
        super().__init__(models=find())

    def answer_find(self) -> dict[str, Any]:
        """Look again."""
        self.models = self.find()
        return {}

    def answer_check(self, identifier: str) -> dict[str, Any]:
        """Start a check, unless one is under way."""
        if self.state != "running":
            self.check(self, identifier)
        return {}


class DownloadCard(Widget):
    """Models to download: first their sizes, without downloading anything, then the download with Stop.

    `bundles` are dicts of name, title and about; `plan` has files of (name, bytes, fate), total and free;
    `state` is ready, asking, planned, loading, done or failed; `progress` has done, total and left_s.
    """

    kind = traitlets.Unicode("download").tag(sync=True)
    bundles: Any = traitlets.List().tag(sync=True)
    state = traitlets.Unicode("ready").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    plan: Any = traitlets.Dict().tag(sync=True)
    progress: Any = traitlets.Dict().tag(sync=True)

    def __init__(
        self, bundles: list[dict[str, str]], act: Callable[[DownloadCard, str, str], None]
    ) -> None:
        self.act = act
        super().__init__(bundles=bundles)

    def answer_act(self, word: str, bundle: str = "") -> dict[str, Any]:
        """Do what a button asks for: plan, fetch or stop."""
        self.act(self, word, bundle)
        return {}

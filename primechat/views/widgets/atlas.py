"""The embedding atlas: a map of many points to explore, search and select from, and to follow over training.

Places and properties are sent to the page as bytes, once per map; after that only the neighbours of a point
are sent. A map that takes long to compute is made in a background job, which the page polls.
Reference: Smilkov et al. 2016, Embedding Projector.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import traitlets

from primechat.events import Cloud, Nearby
from primechat.views.widgets.kit import Widget


class Source(Protocol):
    """The data behind an atlas: spaces (key to title), maps of them, and the neighbours of a point."""

    spaces: dict[str, str]

    @property
    def is_whole(self) -> bool: ...

    def complete(self) -> None: ...

    def show(self, space: str, method: str = "PCA", n_axes: int = 2) -> Cloud: ...

    def near(self, space: str, method: str, n_axes: int, frame: int, point: int) -> Nearby: ...

    def start(self, space: str, n_axes: int = 2) -> Any: ...

    def keep(self, space: str, n_axes: int, picture: Any) -> Cloud: ...


class AtlasView(Widget):
    """A map of a Source; `chosen` are the points selected on the page, `selected()` returns their data."""

    cloud = traitlets.Dict().tag(sync=True)
    places = traitlets.Bytes().tag(sync=True)  # (F, N, 3) float32
    facts = traitlets.Bytes().tag(sync=True)  # (channels, N) float32
    spaces: Any = traitlets.List().tag(sync=True)
    space = traitlets.Unicode().tag(sync=True)
    method = traitlets.Unicode("PCA").tag(sync=True)
    n_axes = traitlets.Int(2).tag(sync=True)
    colour = traitlets.Unicode().tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    frame_word = traitlets.Unicode("Step").tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)
    nearby = traitlets.Dict().tag(sync=True)
    chosen = traitlets.List(traitlets.Int()).tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    # Whether the page still has to request what the first map omits.
    waits = traitlets.Bool(False).tag(sync=True)
    laying_out = traitlets.Bool(False).tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    notice = traitlets.Unicode().tag(sync=True)  # what the page is waiting for

    def __init__(
        self,
        source: Source,
        *,
        colour: str = "",
        picked: int = -1,
        frame: int = 0,
        frame_word: str = "Step",
        text: str = "",
    ) -> None:
        """Show a source.

        Args:
            source: the data to show.
            colour: key of the channel that colours the points; empty takes the first.
            picked: index of the point selected at first; negative selects none.
            frame: the frame to begin with; negative counts from the end.
            frame_word: name of a frame on the page.
            text: the first text, for a source that reads texts; the reader can change it.
        """
        self.source, self.job, self.at = source, None, ("", 2)  # type: tuple[Source, Any, tuple[str, int]]
        if text:
            source.read(text)  # type: ignore[attr-defined]
        space = next(iter(source.spaces))
        super().__init__(
            spaces=[list(item) for item in source.spaces.items()],
            space=space,
            frame_word=frame_word,
            text=text,
            colour=colour,
        )
        self.put_cloud(source.show(space), space)
        self.frame = frame % len(self.shown.frames)
        self.pick_point(picked)

    def pick_point(self, point: int) -> None:
        """Select a point and show its neighbours; a negative index selects none."""
        if point < 0:
            self.picked, self.nearby = -1, {}
            return
        point = min(point, len(self.shown.labels) - 1)
        self.answer_near(
            point, self.frame, f"{point},{self.frame},{self.space},{self.method},{self.n_axes}"
        )

    def take_source(self, source: Source, picked: int = -1) -> None:
        """Show another source, in the same space if it has one of that name."""
        if self.job is not None:
            self.job.stop()
        self.source, self.job, self.laying_out, self.chosen, self.frame = source, None, False, [], 0
        space = self.space if self.space in source.spaces else next(iter(source.spaces))
        self.spaces = [list(item) for item in source.spaces.items()]
        self.picked, self.nearby, self.problem = -1, {}, ""
        self.put_cloud(source.show(space, "PCA", self.n_axes), space)
        self.pick_point(picked)

    def put_cloud(self, cloud: Cloud, space: str) -> None:
        """Send a map to the page."""
        self.shown = cloud
        facts = [np.asarray(c.values, dtype=np.float32) for c in cloud.channels]
        heads = [
            dict(key=c.key, title=c.title, names=list(c.names), whole=c.whole)
            for c in cloud.channels
        ]
        with self.hold_sync():
            self.space, self.method, self.n_axes = space, cloud.method, cloud.n_axes
            if self.chosen and max(self.chosen) >= len(cloud.labels):
                self.chosen = []
            self.places = np.ascontiguousarray(cloud.places, dtype="<f4").tobytes()
            self.facts, self.waits = (
                np.stack(facts).astype("<f4").tobytes(),
                not self.source.is_whole,
            )
            self.cloud = dict(
                title=cloud.title,
                labels=list(cloud.labels),
                frames=list(cloud.frames),
                channels=heads,
                method=cloud.method,
                n_axes=cloud.n_axes,
                shown=list(cloud.shown),
                note=cloud.note,
                kept=list(cloud.kept),
                chance=cloud.chance,
            )

    def answer_complete(self) -> dict[str, Any]:
        """Show the same map with all properties of its points."""
        self.source.complete()
        return self.answer_show(self.space, self.method, self.n_axes)

    def answer_show(self, space: str, method: str, n_axes: int) -> dict[str, Any]:
        """Show another space, or the same one with another method or number of axes."""
        try:
            cloud = self.source.show(space, method, n_axes)
        except ValueError:
            cloud = self.source.show(space, "PCA", n_axes)
        self.put_cloud(cloud, space)
        return {}

    def answer_near(self, point: int, frame: int, key: str = "") -> dict[str, Any]:
        """Return the neighbours of a point, and store them so that a page opened later shows them too."""
        near = self.source.near(self.space, self.method, self.n_axes, frame, point)
        answer = {**asdict(near), "key": key}
        self.picked, self.nearby = point, answer
        return answer

    def answer_read(self, text: str) -> dict[str, Any]:
        """Show another text."""
        self.source.read(text)  # type: ignore[attr-defined]
        self.text, self.picked = text, -1
        self.put_cloud(self.source.show(self.space, "PCA", self.n_axes), self.space)
        return {}

    def answer_lay_out(self, action: str, n_axes: int = 2) -> dict[str, Any]:
        """Start, poll or stop the computation of a UMAP; the map is shown once it is ready."""
        if action == "start" and self.job is None:
            try:
                self.put_cloud(self.source.show(self.space, "UMAP", n_axes), self.space)
                return {"running": False}
            except Exception:  # not computed yet
                self.job, self.at = self.source.start(self.space, n_axes), (self.space, n_axes)

        # Show the map if it is ready.
        picture = None
        if self.job is not None:
            picture = self.job.stop() if action == "stop" else self.job.poll()
        if picture is not None:
            self.job = None
            space, n_axes = self.at
            self.put_cloud(self.source.keep(space, n_axes, picture), space)
        self.laying_out = self.job is not None
        if self.job is None:
            return {"running": False}
        return {"running": True, "elapsed_s": self.job.elapsed_s, "expected_s": self.job.expected_s}

    def selected(self) -> dict[str, list[Any]]:
        """Return the data of the selected points by column, ready for a data frame."""
        labels = [self.shown.labels[i] for i in self.chosen]
        rows: dict[str, list[Any]] = {"token": labels, "id": list(self.chosen)}
        for channel in self.shown.channels:
            values = np.asarray(channel.values)[list(self.chosen)].tolist()
            rows[channel.key] = [channel.names[int(v)] for v in values] if channel.names else values
        return rows

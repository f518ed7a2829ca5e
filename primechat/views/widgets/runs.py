"""Widgets of a stage: Start and Stop with figures, curves and samples; its settings; its summary.

Hides: how events become one state, which is sent at most a few times per second. A control never runs
anything itself: it calls the function that it is given. Reference: primechat.events.
"""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import traitlets

from primechat.events import (
    CheckpointEvent,
    DoneEvent,
    Event,
    LossEvent,
    NoteEvent,
    PhaseEvent,
    ProgressEvent,
    SampleEvent,
    StepEvent,
    count_noun,
)
from primechat.views.widgets.kit import Widget

MAX_POINTS, MAX_NOTES, MAX_SAMPLES = 240, 40, 40
GAUGES = {  # field of a step: title of its small curve
    "lr_ratio": "learning rate, share of its peak",
    "grad_norm": "length of the gradient",
    "update_norm": "how far the matrices moved",
}
MIXED = "what it is taught by: mixed loss, nats"


class RunHistory:
    """The events of a run so far; `describe` returns them in the form that the page draws."""

    def __init__(self) -> None:
        self.phase, self.done, self.t_phase = PhaseEvent(name=""), 0.0, time.monotonic()
        self.training: PhaseEvent | None = None
        self.restart()
        self.notes: list[str] = []

    def restart(self) -> None:
        """Clear the curves, because another training begins."""
        self.samples: list[list[Any]] = []
        self.steps: list[StepEvent] = []
        self.losses: list[LossEvent] = []
        self.last: StepEvent | None = None
        self.saved: int | None = None

    def restore(self, identifier: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Start from the earlier events of a run, so that its curves continue if it is resumed."""
        self.training = PhaseEvent(name=f"training {identifier}", unit="steps")
        for event in events:
            with suppress(KeyError, TypeError):  # an event of another version
                self.add(build_event(event))

    def add(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, PhaseEvent):
            if event.unit == "steps":
                # A phase of the same name is the same training, resumed.
                if self.training is None or self.training.name != event.name:
                    self.restart()
                self.training = event
            self.phase, self.done, self.t_phase = event, 0.0, time.monotonic()
        elif isinstance(event, ProgressEvent):
            self.done = event.done
        elif isinstance(event, StepEvent):
            self.phase = self.training or self.phase
            self.last = event
            # A run that crashed had reported steps that it did not save; the resumed run repeats them.
            while self.steps and self.steps[-1].step >= event.step:
                self.steps.pop()
            self.steps.append(event)
        elif isinstance(event, LossEvent):
            self.losses = [*(loss for loss in self.losses if loss.step < event.step), event]
        elif isinstance(event, SampleEvent):
            self.add_sample(event)
        elif isinstance(event, CheckpointEvent) and not event.snapshot:
            self.saved = event.step
        elif isinstance(event, NoteEvent):
            self.notes = [*self.notes, event.text][-MAX_NOTES:]
        elif isinstance(event, DoneEvent) and not event.stopped:
            self.done = self.phase.total or self.done

    def add_sample(self, event: SampleEvent) -> None:
        """Add a sample; if there are too many, drop every second step, so that the first one is kept."""
        before = [kept for kept in self.samples if kept[0] < event.step or kept[1] != event.prompt]
        if len(before) >= MAX_SAMPLES:
            stay = sorted({kept[0] for kept in before})[::2]
            before = [kept for kept in before if kept[0] in stay or kept[0] == event.step]
        self.samples = sorted(
            [*before, [event.step, event.prompt, event.text]], key=lambda kept: kept[0]
        )

    def describe(self) -> dict[str, Any]:
        """Return the state as plain data; times are in seconds."""
        # Progress and remaining time. While a validation interrupts the training, that of the training is
        # shown, but the last validation has its own bar.
        last, phase, done, left = self.last, self.phase, self.done, None
        is_training, total = phase is self.training, phase.total
        if last and self.training and (is_training or last.step < last.steps):
            done, total = (float(last.step), last.steps) if is_training else (done, total)
            left = last.elapsed_s / max(1, last.step) * (last.steps - last.step)
            left = (left if last.left_s is None else last.left_s) or None
        elif phase.unit == "s" and phase.total:  # no events report passing seconds
            done = min(phase.total, float(int(time.monotonic() - self.t_phase)))
            left = phase.total - done or None
        elif phase.total and done:
            left = (time.monotonic() - self.t_phase) / done * (phase.total - done)

        # Curves. A student's loss includes the distance to its teacher, so it is not comparable with that on
        # new text and gets a curve of its own.
        is_taught = any(loss.retention is not None for loss in self.losses)
        train, loss_name = self.thin("loss_nats", MAX_POINTS), "loss, nats per token"
        gauges = [[text, self.thin(name, MAX_POINTS // 2)] for name, text in GAUGES.items()]
        if is_taught:
            gauges, train, loss_name = [[MIXED, train], *gauges], [], MIXED

        # Figures of the last step and the last validation.
        figures: list[list[str]] = []
        if last:
            figures = [
                [f"{last.step:,} of {last.steps:,}", "steps"],
                [f"{last.loss_nats:.3f}", loss_name],
                [f"{last.tokens_per_s:,.0f}", "tokens per second"],
            ]
        if self.losses:
            newest = self.losses[-1]
            scored = f" ({count_noun(newest.tokens, 'token')})" if newest.tokens else ""
            figures.insert(1, [f"{newest.val_bpb:.3f}", f"bits per byte on new text{scored}"])
            if self.losses[-1].retention is not None:
                figures.insert(2, [f"{self.losses[-1].retention:.1%}", "of the teacher kept"])

        return {
            "phase": phase.name,
            "done": done,
            "total": total,
            "unit": phase.unit,
            "left_s": left,
            "figures": figures,
            "saved": self.saved,
            "notes": self.notes,
            "samples": self.samples,
            "train": train,
            "steps": last.steps if last else 0,
            "gauges": gauges,
            "val": [pair_point(event) for event in self.losses],
        }

    def thin(self, name: str, limit: int) -> list[list[float]]:
        """Return a field of the steps as a curve of at most `limit` points."""
        return thin_points([(event.step, getattr(event, name)) for event in self.steps], limit)


def pair_point(event: LossEvent) -> list[float]:
    """Return the step, nats and bits per byte of a validation, on the same tokens for all points if known."""
    if event.paired_bpb is None or event.paired_loss_nats is None:
        return [event.step, event.val_loss_nats, event.val_bpb]
    return [event.step, event.paired_loss_nats, event.paired_bpb]


def thin_points(points: list[tuple[int, float]], limit: int = MAX_POINTS) -> list[list[float]]:
    """Return at most `limit` points, each the mean of equally many neighbours.

    >>> thin_points([(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)], 2)
    [[1.5, 3.0], [3.5, 1.0]]
    """
    size = -(-len(points) // limit) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]


class StageControl(Widget):
    """Start and Stop of a stage, with a live view of it; `result` is its result.

    `state` is ready, running, stopping, stopped, done, failed or refused. `actions` are the buttons that the
    page offers, each a word for `answer_act` and a label. `beat` changes every second while a run is alive,
    so that the page can say so when it loses contact. `seen` is the page's echo of the state, which makes
    marimo rerun the cells that depend on the result. `place` stays the same when the cell runs again and
    makes a new control: a press that Python has not answered yet is then repeated on the new one.
    """

    kind = traitlets.Unicode("stage").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    place = traitlets.Unicode("").tag(sync=True)
    state = traitlets.Unicode("ready").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    actions: Any = traitlets.List().tag(sync=True)
    view: Any = traitlets.Dict().tag(sync=True)
    beat = traitlets.Int(0).tag(sync=True)
    seen = traitlets.Unicode("ready").tag(sync=True)
    result: Any = None

    def __init__(self, title: str, act: Callable[[str], None], place: str = "") -> None:
        self.act = act
        super().__init__(title=title, place=place)

    def answer_act(self, word: str) -> dict[str, Any]:
        """Do what a button of the page asks for."""
        self.act(word)
        return {}


class SettingsForm(Widget):
    """Settings as a form; `values` are the accepted ones, and `config` is the config that holds them.

    `fields` are dicts of name, title, section, form (text, number, toggle or choice), help, choices and
    simple.
    """

    kind = traitlets.Unicode("settings").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    fields: Any = traitlets.List().tag(sync=True)
    start: Any = traitlets.Dict().tag(sync=True)
    values: Any = traitlets.Dict().tag(sync=True)
    command = traitlets.Unicode("").tag(sync=True)
    revision = traitlets.Int(0).tag(sync=True)
    config: Any = None

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]], **traits: Any) -> None:
        self.change = change
        super().__init__(**traits)

    def answer_change(self, draft: dict[str, Any]) -> dict[str, Any]:
        """Return the accepted values for the page's draft, or {"fault": sentence, "field": name}."""
        return self.change(draft)


class Summary(Widget):
    """The result of a run: figures, curves and notes."""

    kind = traitlets.Unicode("summary").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    view: Any = traitlets.Dict().tag(sync=True)
    notes: Any = traitlets.List().tag(sync=True)


UNITS = {
    "_s": "seconds",
    "_nats": "nats",
    "_bytes": "bytes",
    "bpb": "bits per byte",
    "_mb": "megabytes",
}
NAMES = {
    "val_bpb": "bits per byte on new text",
    "bpb": "bits per byte",
    "n_params": "parameters",
    "tokens_per_s": "tokens per second",
    "train_s": "seconds of training",
    "total_s": "seconds in all",
    "elapsed_s": "seconds",
    "vocab_size": "tokens in the vocabulary",
    "bytes_per_token": "bytes per token",
    "loss_nats": "loss, nats per token",
    "step": "steps of training",
    "tokens": "tokens read",
    "n_conversations": "conversations",
    "val_tokens": "tokens of new text scored",
}


def describe_figures(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the numbers of a record, formatted, with names in plain words.

    >>> describe_figures({"val_bpb": 1.5944, "n_params": 5200000, "path": "base/d4", "stopped": False})
    [['1.594', 'bits per byte on new text'], ['5,200,000', 'parameters']]
    """
    figures = []
    for name, value in record.items():
        # Runs of earlier versions did not record val_tokens, which is then 0.
        known = value or name != "val_tokens"
        if known and isinstance(value, (int, float)) and not isinstance(value, bool):
            end = next((end for end in UNITS if name.endswith(end)), "")
            stem = name.removesuffix(end).replace("_", " ")
            said = (
                "tokens said"
                if name == "tokens" and "n_conversations" in record
                else NAMES.get(name)
            )
            label = said or (f"{stem.strip()}, {UNITS[end]}" if end else stem)
            digits = (
                0 if isinstance(value, int) or abs(value) >= 100 else 3 if abs(value) < 10 else 1
            )
            figures.append([f"{value:,.{digits}f}", label])
    return figures


def build_event(data: Mapping[str, Any]) -> Event:
    """Return an event from a line of metrics.jsonl."""
    kinds = {cls.kind: cls for cls in typing.get_args(Event)}
    cls = kinds[data["kind"]]
    return cls(
        **{item.name: data[item.name] for item in dataclasses.fields(cls) if item.name in data}
    )

"""Progress display of a running stage: bars in a terminal, plain lines in a pipe or a log.

Hides: how events become lines. The events are those of primechat.events; nothing here depends on a stage.
Reference: rich's Progress.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

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
    describe_bpb,
)

SAMPLE_CHARS = 240


def clean_text(text: str, limit: int = 0) -> str:
    """Return a model's text without control characters, and on one line if it is limited in length.

    >>> clean_text("a\\x1b[31mb\\nc"), clean_text("one\\ntwo  three", 8)
    ('a�[31mb\\nc', 'one two …')
    """
    if limit:
        text = " ".join(text.split())
        text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def format_seconds(seconds: float) -> str:
    """Return a duration in the form of a clock.

    >>> format_seconds(7), format_seconds(65), format_seconds(7384)
    ('0:07', '1:05', '2:03:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressView:
    """Progress of a stage as plain lines, with at most one line for steps every `period_s` seconds."""

    def __init__(
        self, stream: TextIO, *, period_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream, self.period_s, self.clock = stream, period_s, clock
        self.phase = PhaseEvent(name="")
        # The phase that takes optimizer steps; a validation may interrupt it.
        self.training: PhaseEvent | None = None
        self.val_bpb: float | None = None
        self.said = ""
        self.t_line = self.t_phase = clock()

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, PhaseEvent):
            if event.unit == "steps":
                self.training, self.val_bpb = event, None
            self.phase, self.t_phase = event, self.clock()
            self.start_phase(event)
        elif isinstance(event, ProgressEvent):
            self.show_share(event.done)
        elif isinstance(event, StepEvent):
            self.phase = self.training = self.training or PhaseEvent(
                name="Training", total=event.steps
            )
            self.show_step(event)
        elif isinstance(event, LossEvent):
            self.val_bpb = event.val_bpb
            measured = describe_bpb(event.val_bpb, event.tokens, 3)
            part = ", the whole split" if event.whole else ""
            self.write_line(f"step {event.step}: validation {measured}{part}")
        elif isinstance(event, SampleEvent):
            room = max(80, SAMPLE_CHARS - len(event.prompt))
            gap = " " if event.prompt[-1:].isspace() or event.text[:1].isspace() else ""
            self.show_sample(
                event.step, clean_text(event.prompt, 60), gap + clean_text(event.text, room)
            )
        elif isinstance(event, CheckpointEvent) and not event.snapshot:
            self.write_line(f"step {event.step}: saved {event.path}")
        elif isinstance(event, NoteEvent):
            self.write_line(event.text)
        elif isinstance(event, DoneEvent):
            self.end_phase(event)
            self.training = None

    def describe_stop(self) -> str:
        """Return what a stop at this moment would finish and save."""
        if self.training:
            return "this step is finished and saved"
        known = {
            "characters": "a tokenizer is saved only once it is whole; if its text is still being read, "
            "nothing is saved",
            "turns": "this turn is finished and saved",
            "tokens": "the result is of what has been scored so far",
        }
        return known.get(self.phase.unit, "the preparation and one step are finished and saved")

    def write_line(self, text: str) -> None:
        """Write one line and flush."""
        print(text, file=self.stream, flush=True)
        self.t_line = self.clock()

    def is_due(self) -> bool:
        """Return whether the last line is old enough for another line of progress."""
        return self.clock() - self.t_line >= self.period_s

    def describe_step(self, event: StepEvent) -> str:
        """Return the figures of a step, with the last validation of this training."""
        bpb = "" if self.val_bpb is None else f" · {self.val_bpb:.3f} bpb"
        return f"loss {event.loss_nats:.3f}{bpb} · {event.tokens_per_s:,.0f} tok/s"

    def start_phase(self, event: PhaseEvent) -> None:
        if event is self.training or not self.training:
            total = f"{event.total:,.0f} {event.unit}"
            total = f"{event.total / 1e6:,.1f} MB" if event.unit == "bytes" else total
            total = f"up to {total}" if event.unit == "s" else total
            line = f"{event.name} ({total})" if event.total else event.name
            if line != self.said:  # training and validation text have phases of the same name
                self.write_line(line)
            self.said = line

    def describe_bytes(self, done: float) -> tuple[str, str]:
        """Return the bytes done with their speed, and the remaining time."""
        speed = done / max(1e-9, self.clock() - self.t_phase)
        left = format_seconds((self.phase.total - done) / speed) if speed else "-:--"
        of = f"{done / 1e6:,.1f} of {self.phase.total / 1e6:,.1f} MB"
        return f"{of} · {speed / 1e6:,.1f} MB/s", f"{left} left"

    def show_share(self, done: float) -> None:
        if self.is_due():
            of = f" of {self.phase.total:,.0f}" if self.phase.total else ""
            share = f"{done:,.0f}{of} {self.phase.unit}"
            if self.phase.unit == "bytes":
                share = " · ".join(self.describe_bytes(done))
            self.write_line(f"{self.phase.name}: {share}")

    def show_step(self, event: StepEvent) -> None:
        if self.is_due() or event.step == event.steps:
            left = event.elapsed_s / max(1, event.step) * (event.steps - event.step)
            left = left if event.left_s is None else event.left_s
            line = (
                f"{self.phase.name}: step {event.step}/{event.steps} · {self.describe_step(event)}"
            )
            self.write_line(f"{line} · {format_seconds(left)} left")

    def show_sample(self, step: int, prompt: str, text: str) -> None:
        self.write_line(f"step {step} writes: {prompt} → {text.strip()}")

    def end_phase(self, event: DoneEvent) -> None:
        return None


class BarView(ProgressView):
    """Progress of a stage as bars: one per phase, which stays when it is finished; lines scroll above."""

    def __init__(self, stream: TextIO, **settings: Any) -> None:
        super().__init__(stream, **settings)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=stream, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self.bar_of: dict[str, Any] = {}
        self.insets: set[str] = set()  # phases that interrupt the training

    def __enter__(self) -> ProgressView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def write_line(self, text: str) -> None:
        """Write one line above the bars."""
        from rich.text import Text

        self.console.print(Text(text, style="dim"))

    def start_phase(self, event: PhaseEvent) -> None:
        self.close_bars(keep=self.training.name if self.training else "")
        short = event.name.partition(":")[0]  # leaves more room for the bar
        # No events report passing seconds, so such a bar has no total.
        total = None if event.unit == "s" else event.total or None
        self.bar_of[event.name] = self.bars.add_task(short, total=total, figures="")
        if self.training and event is not self.training:
            self.insets.add(event.name)

    def show_share(self, done: float) -> None:
        if self.phase.name in self.bar_of:
            figures = self.describe_bytes(done)[0] if self.phase.unit == "bytes" else ""
            self.bars.update(self.bar_of[self.phase.name], completed=done, figures=figures)

    def show_step(self, event: StepEvent) -> None:
        if self.phase.name not in self.bar_of:
            self.start_phase(self.phase)
        self.close_bars(keep=self.phase.name)
        bar, figures = self.bar_of[self.phase.name], self.describe_step(event)
        self.bars.update(bar, completed=event.step, total=event.steps, figures=figures)

    def show_sample(self, step: int, prompt: str, text: str) -> None:
        from rich.text import Text

        head = Text(f"step {step} writes: {prompt}", style="dim")
        self.console.print(Text.assemble(head, (text, "cyan")))

    def end_phase(self, event: DoneEvent) -> None:
        if event.stopped:
            self.bar_of.clear()
        self.close_bars()

    def close_bars(self, *, keep: str = "") -> None:
        """Finish every bar but one: those that interrupted the training vanish, the others stay full."""
        for name in [name for name in self.bar_of if name != keep]:
            bar = self.bar_of.pop(name)
            if name in self.insets:
                self.bars.remove_task(bar)
                self.insets.remove(name)
            else:
                self.bars.update(bar, total=1, completed=1)


def open_view(stream: TextIO | None = None) -> ProgressView:
    """Return the view that suits a stream: bars on a terminal, plain lines elsewhere."""
    stream = stream or sys.stdout
    return BarView(stream) if stream.isatty() else ProgressView(stream)

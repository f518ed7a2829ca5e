"""Where a lab runs, and a stage that runs there on a thread behind Start and Stop.

Hides: how one learns that a cell ran again, a session closed or a kernel exits: then the run is asked to
stop, and it saves. What the control shows is what the thread is doing. Reference: marimo's Thread, ipykernel.
"""

from __future__ import annotations

import atexit
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from primechat import store
from primechat.errors import PrimechatError
from primechat.records import Event
from primechat.views.widgets.runs import RunLog, StageControl

SEND_EVERY_S, BEAT_EVERY_S = 0.3, 1.0
END_WAIT_S = 20.0  # for a run to save when the kernel exits


def in_marimo() -> bool:
    """Tell whether this runs in a marimo notebook, as opposed to Jupyter or a script."""
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def in_notebook() -> bool:
    """Tell whether somebody can press buttons: in marimo or in a Jupyter kernel."""
    return in_marimo() or find_shell() is not None


def find_shell() -> Any:
    """Return the shell of the Jupyter kernel that this runs in, None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def show(widget: Any) -> Any:
    """Return a widget as the present host shows it; its attributes can be read from what is returned.

    Args:
        widget: one of ours, or a plotly FigureWidget.
    """
    return sys.modules["marimo"].ui.anywidget(widget) if in_marimo() else widget


class StopWish(threading.Event):
    """A wish to stop that is also true once the cell or the session that it belongs to is over."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over

    def is_set(self) -> bool:
        """Tell whether to stop."""
        return super().is_set() or self.is_over()


class Runner:
    """Runs a stage on a thread for a control, one run at a time."""

    def __init__(self, function: Callable[..., Any], config: Any, title: str) -> None:
        self.function, self.config = function, config
        self.control = StageControl(title, self.act)
        self.log, self.lock = RunLog(), threading.Lock()
        self.is_over = watch_cell()
        self.stop = StopWish(self.is_over)
        self.thread: threading.Thread | None = None
        self.offer("ready")

    def offer(self, state: str, message: str = "") -> None:
        """Tell the page how things stand, and what can be done now."""
        start, go_on, afresh = ("start", "Start"), ("resume", "Go on"), ("afresh", "Start afresh")
        has_resume = hasattr(self.config, "resume") and hasattr(self.config, "tag")
        actions = {"ready": [start], "running": [("stop", "Stop and save")], "stopping": []}.get(state)
        if actions is None:
            is_there = state == "stopped" or (state == "failed" and "resume" in message)
            actions = [go_on, afresh] if has_resume and is_there else [("again", "Run again")]
        with self.control.hold_sync():
            self.control.actions = [list(action) for action in actions]
            self.control.message, self.control.state = message, state

    def act(self, word: str) -> None:
        """Do what a button asks for."""
        if word == "stop":
            self.stop.set()
            if self.thread and self.thread.is_alive():
                self.offer("stopping", "This step is finished and saved first.")
            return
        if self.thread and self.thread.is_alive():
            return  # a second press of Start
        config = self.config
        if word == "resume":
            config = dataclasses.replace(config, resume=True)
        elif hasattr(config, "tag"):  # afresh, or once more: under a name of its own
            config = dataclasses.replace(config, tag=find_free(config.tag))
            config = dataclasses.replace(config, resume=False) if hasattr(config, "resume") else config
        self.stop, self.log = StopWish(self.is_over), RunLog()
        self.control.result = None
        self.offer("running")
        self.thread = threading.Thread(target=self.work, args=(config,), daemon=True)
        _runners.append(self)
        self.thread.start()
        threading.Thread(target=self.report, args=(self.thread,), daemon=True).start()

    def work(self, config: Any) -> None:
        """Run the stage to its end; on the worker's thread."""
        try:
            result = self.function(config, on_event=self.hear, stop=self.stop)
            state, message = self.judge(result)
        except Exception as error:  # whatever ends a run is told where the learner looks
            result, state, message = None, "failed", explain_error(error)
        self.config = config if result is not None else self.config
        self.control.result = result
        self.control.view = self.log.describe()
        self.offer(state, message)
        _runners.remove(self)

    def judge(self, result: Any) -> tuple[str, str]:
        """Return the state that a result means, and a sentence."""
        parts = (result, getattr(result, "base", None), getattr(result, "chat", None))
        stopped = any(bool(getattr(part, "stopped", False)) for part in parts if part is not None)
        if not stopped:
            return "done", ""
        steps = self.log.saved if self.log.saved is not None else 0
        return "stopped", f"Stopped and saved after {steps:,} steps. Go on where it stopped, or start afresh."

    def hear(self, event: Event) -> None:
        """Take in an event; on the worker's thread."""
        with self.lock:
            self.log.add(event)

    def report(self, thread: threading.Thread) -> None:
        """Send what changed, a few times a second, and a sign of life while the run lives."""
        shown: dict[str, Any] = {}
        t_beat = time.monotonic()
        while thread.is_alive() and not self.is_over():
            with self.lock:
                view = self.log.describe()
            if view != shown and self.control.state in ("running", "stopping"):
                self.control.view = shown = view
            if time.monotonic() - t_beat > BEAT_EVERY_S:
                t_beat, self.control.beat = time.monotonic(), self.control.beat + 1
            thread.join(SEND_EVERY_S)


_runners: list[Runner] = []
_cells: dict[str, Runner] = {}


def watch_cell() -> Callable[[], bool]:
    """Return a function that tells whether the present cell has run again, or its session is over."""
    if not in_marimo():
        return lambda: False  # in Jupyter `stage` itself sees that a cell runs again
    token = sys.modules["marimo"].Thread(target=lambda: None)  # never started: it only knows its cell's life
    return lambda: bool(token.should_exit)


def find_cell() -> str:
    """Return the identity of the present Jupyter cell, empty where there is none."""
    shell = find_shell()
    return str(shell.get_parent().get("metadata", {}).get("cellId", "")) if shell is not None else ""


def keep_runner(runner: Runner) -> Runner:
    """Return a runner, once the one that its Jupyter cell made before has been asked to stop."""
    cell = find_cell()
    if cell:
        before = _cells.get(cell)
        if before is not None:
            before.stop.set()
        _cells[cell] = runner
    return runner


@atexit.register
def end_runs() -> None:
    """Let each run save before the kernel exits."""
    runners = list(_runners)
    for runner in runners:
        runner.stop.set()
    for runner in runners:
        if runner.thread:
            runner.thread.join(END_WAIT_S)


def find_free(tag: str) -> str:
    """Return a tag that no model has: d4, d4-2, d4-3 ..."""
    taken = {entry.tag for entry in store.list_models() if not entry.shipped}
    stem = re.sub(r"-\d+$", "", tag)
    names = [tag, *(f"{stem}-{n}" for n in range(2, 10_000))]
    return next(name for name in names if name not in taken)


def explain_error(error: BaseException) -> str:
    """Return an error as a page shows it: ours are sentences, others are named."""
    return str(error) if isinstance(error, PrimechatError) else f"{type(error).__name__}: {error}"

"""Detection of the host of a lab, and stages that run there on a thread behind Start and Stop.

Hides: how a host reports that a cell ran again, a session closed or the kernel exits. In each case the run is
asked to stop, and it saves. The control always shows what the thread is doing.
Reference: marimo's Thread, ipykernel.
"""

from __future__ import annotations

import atexit
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import take_frozen
from primechat.config.names import FOLDERS
from primechat.errors import PrimechatError, explain_error
from primechat.events import Event, TrainResult, count_noun
from primechat.labkit.forms import follow_form, renew_config
from primechat.views.widgets.figure import WaitingFigure
from primechat.views.widgets.kit import Widget
from primechat.views.widgets.runs import RunHistory, StageControl
from primechat.views.words import name_field

SEND_EVERY_S, BEAT_EVERY_S = 0.3, 1.0
END_WAIT_S = 20.0  # time for a run to save when the kernel exits
AHEAD_S = 60.0  # time for a cell to receive the newer settings that its run has started with
RUNS = {  # config class: family of the run that it makes
    "PretrainConfig": "base",
    "FinetuneConfig": "sft",
    "LoRAConfig": "lora",
    "DistillConfig": "base",
}
still = False  # True while a lab is rendered as a static page, where nobody can press Start


def in_marimo() -> bool:
    """Return whether this runs in a marimo notebook, as opposed to Jupyter or a script."""
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def in_notebook() -> bool:
    """Return whether buttons can be pressed: in marimo or in a Jupyter kernel."""
    return in_marimo() or find_shell() is not None


def in_app() -> bool:
    """Return whether the lab is open as a marimo app, which shows no code."""
    return in_marimo() and sys.modules["marimo"].app_meta().mode == "run"


def find_shell() -> Any:
    """Return the shell of the current Jupyter kernel, or None outside one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def show(widget: Any, *, after: str = "") -> Any:
    """Return a widget in the form that the current host displays; it keeps the widget's attributes.

    Args:
        widget: a widget of primechat, a plotly FigureWidget, a plotly Figure that will not change, or a
            function that returns a Figure and is called when the reader scrolls to it.
        after: question of a `predict` whose answer the widget would give away; the widget stays hidden until
            the reader has guessed.

    Raises:
        TypeError: the widget cannot wait for a guess.
    """
    if callable(widget) or (
        hasattr(widget, "to_plotly_json") and (after or not hasattr(widget, "comm"))
    ):
        widget = WaitingFigure(widget)
    if after:
        if not isinstance(widget, Widget):
            raise TypeError(
                f"a {type(widget).__name__} cannot wait for a guess; show a figure or a widget."
            )
        widget.gate = after
    return sys.modules["marimo"].ui.anywidget(widget) if in_marimo() else widget


class StopWish(threading.Event):
    """A stop event that is also set once the cells or sessions it belongs to are over."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over

    def is_set(self) -> bool:
        """Return whether to stop."""
        return super().is_set() or self.is_over()


class Runner:
    """A stage on a thread, one run at a time; all controls that join it show the same run.

    It lives as long as any of the cells (or, in an app, sessions) that made a control for it.
    """

    def __init__(self, function: Callable[..., Any], config: Any, place: str = "") -> None:
        self.function, self.config = function, config
        self.given = self.asked = config  # from the cell; from the reader's last press of Start
        self.place, self.t_ahead = place, -AHEAD_S
        self.controls: list[tuple[StageControl, Callable[[], bool]]] = []
        self.log, self.lock = RunHistory(), threading.RLock()
        self.stop = StopWish(self.is_over)
        self.thread: threading.Thread | None = None
        self.state: dict[str, Any] = {}
        self.survey()
        if not in_marimo():  # marimo reruns the cell instead, which makes a new Runner
            follow_form(config, self.follow)

    def survey(self, result: Any = None) -> None:
        """Offer what the current settings allow: to start a run, or to resume one of the same name."""
        if fault := find_fault(self.config):
            self.offer("refused", fault, result)
            return
        self.offer("ready", result=result)
        if (old := find_earlier(self.config)) is not None:
            self.log.restore(old.identifier, old.events)
            self.offer(
                "stopped" if old.stopped else "done", describe_earlier(self.config, old), old
            )

    def follow(self) -> None:
        """Update what Start will do after a form has changed; the result of an earlier run is kept."""
        with self.lock:
            if not self.is_busy:
                self.config = renew_config(self.given)
                self.survey(self.state["result"])

    @property
    def is_busy(self) -> bool:
        """Whether a run is under way."""
        return self.state["state"] in ("running", "stopping")

    @property
    def is_ahead(self) -> bool:
        """Whether the run started with settings for which marimo is about to rerun the cell."""
        return time.monotonic() - self.t_ahead < AHEAD_S

    def is_over(self) -> bool:
        """Return whether no cell or session of this run is left."""
        return not self.is_ahead and all(over() for _, over in self.controls)

    def join(self, title: str) -> StageControl:
        """Return a new control of this run."""
        control = StageControl(title, self.act, self.place)
        with self.lock:
            self.controls.append((control, watch_cell()))
            self.update(view=self.log.describe(), **self.state)
        return control

    def update(self, **traits: Any) -> None:
        """Update the traits of all live controls."""
        # The last control is kept even if it is over, so that there is always one.
        self.controls = [pair for pair in self.controls if not pair[1]()] or self.controls[-1:]
        for control, over in self.controls:
            if over():
                control.comm = None  # no page shows it any more
            with control.hold_sync():
                for name, value in traits.items():
                    setattr(control, name, value)

    def offer(self, state: str, message: str = "", result: Any = None) -> None:
        """Show the state, the buttons that apply to it, and the name under which each would run."""
        # The buttons that this state allows.
        start, go_on, afresh = ("start", "Start"), ("resume", "Go on"), ("afresh", "Start afresh")
        has_resume = hasattr(self.config, "resume") and hasattr(self.config, "tag")
        actions = {
            "ready": [start],
            "running": [("stop", "Stop and save")],
            "stopping": [],
            "refused": [],
        }.get(state)
        if actions is None:
            is_there = state == "stopped" or (state == "failed" and "resume" in message)
            can_go_on = has_resume and is_there and not find_change(self.config)
            actions = [go_on, afresh] if can_go_on else [("again", "Run again")]

        # One sentence per button, after the message.
        if name_model(self.config):
            said = [foretell_run(word, label, self.config) for word, label in actions]
            ended = message if not message or message.endswith((".", "!", "?")) else f"{message}."
            message = " ".join(filter(None, [ended, *said]))

        listed = [list(action) for action in actions]
        self.state = {"result": result, "actions": listed, "message": message, "state": state}
        self.update(**self.state)

    def act(self, word: str) -> None:
        """Do what a button asks for; pressing the same button twice has no further effect.

        A new run takes the current settings, even if its cell has not received them yet.

        Args:
            word: "start", "stop", "resume", "afresh" or "again".
        """
        with self.lock:
            # Stop.
            if word == "stop" and self.is_busy:
                self.stop.set()
                self.offer("stopping", "This step is finished and saved first.")
            if word == "stop" or self.is_busy:
                return

            # The settings: those of the run that is resumed, or the current ones.
            if word == "resume":
                config = dataclasses.replace(self.config, resume=True)
            else:
                config = renew_config(self.given)
                if fault := find_fault(config):
                    self.offer("refused", fault, self.state["result"])
                    return
                self.asked = config
                self.t_ahead = (
                    time.monotonic() if in_marimo() and config is not self.given else -AHEAD_S
                )

            # A new run gets a name of its own.
            is_new = word in ("afresh", "again") or (word == "start" and is_taken(config))
            if is_new and hasattr(config, "tag"):
                config = dataclasses.replace(config, tag=find_free(config.tag))
                if hasattr(config, "resume"):
                    config = dataclasses.replace(config, resume=False)

            # Start the thread; a resumed run keeps its log, so that its curves continue.
            self.config, self.stop = config, StopWish(self.is_over)
            self.log = self.log if word == "resume" else RunHistory()
            self.offer("running")
            self.thread = threading.Thread(target=self.work, args=(config,), daemon=True)
            _runners.append(self)
        self.thread.start()
        threading.Thread(target=self.report, args=(self.thread,), daemon=True).start()

    def work(self, config: Any) -> None:
        """Run the stage to its end; called on the worker thread."""
        try:
            result = self.function(config, on_event=self.hear, stop=self.stop)
            state, message = self.judge(result)
        except Exception as error:  # any failure is shown in the control, where the reader looks
            result, state, message = None, "failed", explain_error(error)
        with self.lock:
            _runners.remove(self)
            self.update(view=self.log.describe())
            self.offer(state, message, result)

    def judge(self, result: Any) -> tuple[str, str]:
        """Return the state to show after a result, and a sentence about it."""
        parts = (result, getattr(result, "base", None), getattr(result, "chat", None))
        stopped = any(bool(getattr(part, "stopped", False)) for part in parts if part is not None)
        if not stopped:
            return "done", ""
        steps = self.log.saved if self.log.saved is not None else 0
        kept = f"Stopped and saved after {count_noun(steps, 'step')}."
        if name_model(self.config):
            return "stopped", kept
        return "stopped", f"{kept} Go on where it stopped, or start afresh."

    def hear(self, event: Event) -> None:
        """Add an event to the log; called on the worker thread."""
        with self.lock:
            self.log.add(event)

    def report(self, thread: threading.Thread) -> None:
        """Send changes of the view a few times per second, and a heartbeat, while the run is under way."""
        shown: dict[str, Any] = {}
        beat, t_beat = 0, time.monotonic()
        while thread.is_alive():
            with self.lock:
                view = self.log.describe()
                if self.is_busy and view != shown:
                    shown = view
                    self.update(view=view)
                if self.is_busy and time.monotonic() - t_beat > BEAT_EVERY_S:
                    beat, t_beat = beat + 1, time.monotonic()
                    self.update(beat=beat)
            thread.join(SEND_EVERY_S)


_runners: list[Runner] = []
_cells: dict[str, Runner] = {}


def watch_cell() -> Callable[[], bool]:
    """Return a function that says whether the current cell has run again or its session is over."""
    if not in_marimo():
        return lambda: False  # in Jupyter, `open_control` detects that a cell runs again
    # Never started: the thread object only learns from marimo that its cell is over.
    token = sys.modules["marimo"].Thread(target=lambda: None)
    kernel = threading.current_thread()  # an app's session has a thread of its own
    return lambda: bool(token.should_exit) or not kernel.is_alive()


def find_cell() -> str:
    """Return the id of the current Jupyter cell, or "" if there is none."""
    shell = find_shell()
    return (
        str(shell.get_parent().get("metadata", {}).get("cellId", "")) if shell is not None else ""
    )


def find_earlier(config: Any) -> TrainResult | None:
    """Return the result of the existing run that a config names, or None if there is none."""
    family = RUNS.get(type(config).__name__, "")
    with suppress(PrimechatError):
        return registry.load_run(registry.run_dir(family, config.tag)) if family else None
    return None


def name_model(config: Any) -> str:
    """Return the identifier of the model that a config makes, or "" if it makes none with a name.

    >>> from primechat.config import DistillConfig
    >>> name_model(DistillConfig(tag="student"))
    'base/student'
    """
    family, tag = RUNS.get(type(config).__name__, ""), getattr(config, "tag", "")
    return "" if not family or not tag else f"lora:{tag}" if family == "lora" else f"{family}/{tag}"


def find_fault(config: Any) -> str:
    """Return why a stage cannot start with these settings, or "" if no reason is visible beforehand."""
    if type(config).__name__ not in ("FinetuneConfig", "LoRAConfig"):
        return ""
    from primechat.text.dialogues import parse_mixture

    if not config.dialogues.strip(" ,"):
        return (
            "There is nothing to learn from: no set of conversations is in the mixture. Give one a weight "
            "above zero, or name one in the settings, for example chitchat."
        )
    try:
        parse_mixture(config.dialogues)
    except PrimechatError as error:
        return str(error)
    return ""


def is_taken(config: Any) -> bool:
    """Return whether a run of the config's name exists already, so that starting it would be refused."""
    family = RUNS.get(type(config).__name__, "")
    if not family or getattr(config, "resume", False):
        return False
    with suppress(PrimechatError):
        return bool(registry.find_steps(registry.run_dir(family, config.tag)))
    return False


def find_change(config: Any) -> str:
    """Return how a config differs from that of the run of its name, or "" if the run can be resumed."""
    family = RUNS.get(type(config).__name__, "")
    if not family:
        return ""
    try:
        folder = registry.run_dir(family, config.tag)
        if (folder / "config.json").is_file():
            take_frozen(dataclasses.replace(config, resume=True), folder)
    except PrimechatError as error:
        return explain_change(str(error).partition(" (the run's, then yours)")[0])
    return ""


def explain_change(difference: str) -> str:
    """Return a difference between two configs in the words of the settings form.

    >>> explain_change("steps: 40 != 60")
    'Steps of training: 40 then, 60 now'
    """
    found = re.fullmatch(r"([\w.]+): (.+) != (.+)", difference)
    return f"{name_field(found[1])}: {found[2]} then, {found[3]} now" if found else difference


def describe_earlier(config: Any, old: TrainResult) -> str:
    """Return a sentence about the existing run that a config names."""
    ended = f", stopped after {count_noun(old.step, 'step')}" if old.stopped else ""
    change = find_change(config)
    other = f" It was made with other settings ({change})." if change else ""
    return f"{old.identifier} is here already{ended}.{other}"


def foretell_run(word: str, label: str, config: Any) -> str:
    """Return a sentence that says which run a button will continue or make."""
    if word == "resume":
        return f"{label} continues {name_model(config)}."
    if word == "start" and not is_taken(config):
        return f"{label} makes a new run, {name_model(config)}."
    if word in ("start", "afresh", "again"):
        new = dataclasses.replace(config, tag=find_free(config.tag))
        return f"{label} makes a new run, {name_model(new)}."
    return ""


def name_run(function: Callable[..., Any], config: Any) -> tuple[Any, str]:
    """Return the identity of a run: the code of its stage and its tag.

    A function defined in a lab is a new object on every page, but its code is the same.
    """
    return getattr(function, "__code__", function), str(getattr(config, "tag", ""))


def open_control(function: Callable[..., Any], config: Any, title: str) -> StageControl:
    """Return a control of a stage, attached to a run that is already under way if there is one.

    In an app, a page that is opened again joins the current run. In a marimo notebook, so does a cell that
    is rerun with the settings its run has already started with. When a Jupyter cell runs again, its earlier
    run is stopped and saved, as marimo does for a notebook cell.
    """
    # Join a run that is under way.
    place = f"{threading.get_ident()} {getattr(function, '__qualname__', '')} {title}"
    for runner in list(_runners):
        is_ahead = runner.place == place and runner.is_ahead
        if is_ahead and runner.asked == config:
            runner.given = config
            return runner.join(title)
        if in_app() and name_run(runner.function, runner.asked) == name_run(function, config):
            return runner.join(title)
        if is_ahead:  # the reader has changed the settings once more
            runner.t_ahead = -AHEAD_S

    # Make a new runner; in Jupyter, stop the one that this cell made before.
    runner, cell = Runner(function, config, place), find_cell()
    if cell:
        before = _cells.get(cell)
        if before is not None:
            before.stop.set()
        _cells[cell] = runner
    return runner.join(title)


@atexit.register
def end_runs() -> None:
    """Stop all runs and let them save before the kernel exits."""
    runners = list(_runners)
    for runner in runners:
        runner.stop.set()
    for runner in runners:
        if runner.thread:
            runner.thread.join(END_WAIT_S)


def find_free(tag: str) -> str:
    """Return a tag that no model has yet, for example d4, d4-2, d4-3."""
    parents = [registry.base_dir() / name for name in FOLDERS.values()]
    folders = [folder for parent in parents if parent.is_dir() for folder in parent.iterdir()]
    taken = {f.name for f in folders if registry.is_run(f) and registry.find_steps(f)}
    taken |= {entry.tag for entry in registry.walk_adapters(registry.base_dir() / FOLDERS["lora"])}
    stem = re.sub(r"-\d+$", "", tag)
    names = [tag, *(f"{stem}-{n}" for n in range(2, 10_000))]
    return next(name for name in names if name not in taken)

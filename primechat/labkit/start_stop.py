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
from primechat.views.widgets.runs import RunLog, StageControl
from primechat.views.words import name_field

SEND_EVERY_S, BEAT_EVERY_S = 0.3, 1.0
END_WAIT_S = 20.0  # for a run to save when the kernel exits
AHEAD_S = 60.0  # until the cell of a run that began with newer settings than its own has been given them too
RUNS = {  # settings: family of the run that they make
    "PretrainConfig": "base",
    "FinetuneConfig": "sft",
    "LoRAConfig": "lora",
    "DistillConfig": "base",
}
still = False  # while a lab is made into a page: its stages wait for a Start that nobody presses


def in_marimo() -> bool:
    """Tell whether this runs in a marimo notebook, as opposed to Jupyter or a script."""
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def in_notebook() -> bool:
    """Tell whether somebody can press buttons: in marimo or in a Jupyter kernel."""
    return in_marimo() or find_shell() is not None


def in_app() -> bool:
    """Tell whether this is a lab opened as an app, which shows no code."""
    return in_marimo() and sys.modules["marimo"].app_meta().mode == "run"


def find_shell() -> Any:
    """Return the shell of the Jupyter kernel that this runs in, None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def show(widget: Any, *, after: str = "") -> Any:
    """Return a widget, ours or plotly's FigureWidget, or a plotly Figure that nothing will change, as the
    present host shows it; its attributes can be read from what is returned. Instead of a Figure it can be a
    function that returns one, called when the reader comes to it. What shows the answer to a question of
    `predict` opens `after` the guess.

    Raises:
        TypeError: it cannot wait for a guess.
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
    """A wish to stop that is also true once the cells or sessions that it belongs to are over."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over

    def is_set(self) -> bool:
        """Tell whether to stop."""
        return super().is_set() or self.is_over()


class Runner:
    """Runs a stage on a thread, one run at a time; each control that joins shows the same run.

    It lives as long as one of the cells (or, in an app, sessions) that made a control for it.
    """

    def __init__(self, function: Callable[..., Any], config: Any, place: str = "") -> None:
        self.function, self.config = function, config
        self.given = self.asked = config  # by its cell; by the learner
        self.place, self.t_ahead = place, -AHEAD_S
        self.controls: list[tuple[StageControl, Callable[[], bool]]] = []
        self.log, self.lock = RunLog(), threading.RLock()
        self.stop = StopWish(self.is_over)
        self.thread: threading.Thread | None = None
        self.state: dict[str, Any] = {}
        self.survey()
        if not in_marimo():  # there the cell runs again, and there is a new one of these
            follow_form(config, self.follow)

    def survey(self, result: Any = None) -> None:
        """Offer what the settings in force can do: begin, or take up a run of their name that is here."""
        if fault := find_fault(self.config):
            self.offer("refused", fault, result)
            return
        self.offer("ready", result=result)
        if (old := find_earlier(self.config)) is not None:
            self.log.take_up(old.identifier, old.events)
            self.offer(
                "stopped" if old.stopped else "done", describe_earlier(self.config, old), old
            )

    def follow(self) -> None:
        """Say what Start does with the settings that a form has now; what a run has made stays."""
        with self.lock:
            if not self.is_busy:
                self.config = renew_config(self.given)
                self.survey(self.state["result"])

    @property
    def is_busy(self) -> bool:
        """Tell whether a run is under way."""
        return self.state["state"] in ("running", "stopping")

    @property
    def is_ahead(self) -> bool:
        """Tell whether the run began with settings for which marimo is about to run its cell again."""
        return time.monotonic() - self.t_ahead < AHEAD_S

    def is_over(self) -> bool:
        """Tell whether nobody's cell or session is left."""
        return not self.is_ahead and all(over() for _, over in self.controls)

    def join(self, title: str) -> StageControl:
        """Return a new control of this run."""
        control = StageControl(title, self.act, self.place)
        with self.lock:
            self.controls.append((control, watch_cell()))
            self.tell(view=self.log.describe(), **self.state)
        return control

    def tell(self, **traits: Any) -> None:
        """Bring every control that still lives up to date."""
        self.controls = [pair for pair in self.controls if not pair[1]()] or self.controls[-1:]
        for control, over in self.controls:
            if over():
                control.comm = None  # no page has it any more
            with control.hold_sync():
                for name, value in traits.items():
                    setattr(control, name, value)

    def offer(self, state: str, message: str = "", result: Any = None) -> None:
        """Tell the pages how things stand, what can be done now, and under which name it would run."""
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
        if name_model(self.config):
            said = [foretell_run(word, label, self.config) for word, label in actions]
            ended = message if not message or message.endswith((".", "!", "?")) else f"{message}."
            message = " ".join(filter(None, [ended, *said]))
        listed = [list(action) for action in actions]
        self.state = {"result": result, "actions": listed, "message": message, "state": state}
        self.tell(**self.state)

    def act(self, word: str) -> None:
        """Do what a button asks for; a second press of the same one does nothing. A run that is not resumed
        takes the settings that are in force now, also where its cell has not been given them yet.
        """
        with self.lock:
            if word == "stop" and self.is_busy:
                self.stop.set()
                self.offer("stopping", "This step is finished and saved first.")
            if word == "stop" or self.is_busy:
                return
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
            is_new = word in ("afresh", "again") or (word == "start" and is_taken(config))
            if is_new and hasattr(config, "tag"):  # under a name of its own
                config = dataclasses.replace(config, tag=find_free(config.tag))
                if hasattr(config, "resume"):
                    config = dataclasses.replace(config, resume=False)
            self.config, self.stop = config, StopWish(self.is_over)
            self.log = self.log if word == "resume" else RunLog()  # so a resumed run's curves go on
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
        with self.lock:
            _runners.remove(self)
            self.tell(view=self.log.describe())
            self.offer(state, message, result)

    def judge(self, result: Any) -> tuple[str, str]:
        """Return the state that a result means, and a sentence."""
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
        """Take in an event; on the worker's thread."""
        with self.lock:
            self.log.add(event)

    def report(self, thread: threading.Thread) -> None:
        """Send what changed, a few times a second, and a sign of life while the run lives."""
        shown: dict[str, Any] = {}
        beat, t_beat = 0, time.monotonic()
        while thread.is_alive():
            with self.lock:
                view = self.log.describe()
                if self.is_busy and view != shown:
                    shown = view
                    self.tell(view=view)
                if self.is_busy and time.monotonic() - t_beat > BEAT_EVERY_S:
                    beat, t_beat = beat + 1, time.monotonic()
                    self.tell(beat=beat)
            thread.join(SEND_EVERY_S)


_runners: list[Runner] = []
_cells: dict[str, Runner] = {}


def watch_cell() -> Callable[[], bool]:
    """Return a function that tells whether the present cell has run again, or its session is over."""
    if not in_marimo():
        return lambda: False  # in Jupyter `open_control` itself sees that a cell runs again
    token = sys.modules["marimo"].Thread(
        target=lambda: None
    )  # never started: it only knows its cell's life
    kernel = threading.current_thread()  # an app's session has a thread of its own
    return lambda: bool(token.should_exit) or not kernel.is_alive()


def find_cell() -> str:
    """Return the identity of the present Jupyter cell, empty where there is none."""
    shell = find_shell()
    return (
        str(shell.get_parent().get("metadata", {}).get("cellId", "")) if shell is not None else ""
    )


def find_earlier(config: Any) -> TrainResult | None:
    """Return what came of a run that bears the name in a config, None where there is none."""
    family = RUNS.get(type(config).__name__, "")
    with suppress(PrimechatError):
        return registry.load_run(registry.run_dir(family, config.tag)) if family else None
    return None


def name_model(config: Any) -> str:
    """Return the identifier of the model that settings make, "" where they make none under a name.

    >>> from primechat.config import DistillConfig
    >>> name_model(DistillConfig(tag="student"))
    'base/student'
    """
    family, tag = RUNS.get(type(config).__name__, ""), getattr(config, "tag", "")
    return "" if not family or not tag else f"lora:{tag}" if family == "lora" else f"{family}/{tag}"


def find_fault(config: Any) -> str:
    """Return why a stage cannot begin with these settings, where that can be known at once, else ""."""
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
    """Return whether there is a run already of the name in a config, which starting it would refuse."""
    family = RUNS.get(type(config).__name__, "")
    if not family or getattr(config, "resume", False):
        return False
    with suppress(PrimechatError):
        return bool(registry.find_steps(registry.run_dir(family, config.tag)))
    return False


def find_change(config: Any) -> str:
    """Return how settings differ from those of the run that bears their name, "" where it can go on."""
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
    """Return a difference of two configs in the words of the form.

    >>> explain_change("steps: 40 != 60")
    'Steps of training: 40 then, 60 now'
    """
    found = re.fullmatch(r"([\w.]+): (.+) != (.+)", difference)
    return f"{name_field(found[1])}: {found[2]} then, {found[3]} now" if found else difference


def describe_earlier(config: Any, old: TrainResult) -> str:
    """Return the sentence that tells of a run that bears the name in a config."""
    ended = f", stopped after {count_noun(old.step, 'step')}" if old.stopped else ""
    change = find_change(config)
    other = f" It was made with other settings ({change})." if change else ""
    return f"{old.identifier} is here already{ended}.{other}"


def foretell_run(word: str, label: str, config: Any) -> str:
    """Return what a button will do, by the name of the run: continue one, or make a new one."""
    if word == "resume":
        return f"{label} continues {name_model(config)}."
    if word == "start" and not is_taken(config):
        return f"{label} makes a new run, {name_model(config)}."
    if word in ("start", "afresh", "again"):
        new = dataclasses.replace(config, tag=find_free(config.tag))
        return f"{label} makes a new run, {name_model(new)}."
    return ""


def name_run(function: Callable[..., Any], config: Any) -> tuple[Any, str]:
    """Return what tells runs apart; a lab's own function is made anew for each page, from the same code."""
    return getattr(function, "__code__", function), str(getattr(config, "tag", ""))


def open_control(function: Callable[..., Any], config: Any, title: str) -> StageControl:
    """Return a control of a stage.

    In an app a page that is opened again joins the run that goes on, and so does a cell of marimo that is
    given the settings with which a press on its former button has begun. A Jupyter cell that runs again has
    its former run stopped and saved, as marimo does with a cell of a notebook.
    """
    place = f"{threading.get_ident()} {getattr(function, '__qualname__', '')} {title}"
    for runner in list(_runners):
        is_ahead = runner.place == place and runner.is_ahead
        if is_ahead and runner.asked == config:
            runner.given = config
            return runner.join(title)
        if in_app() and name_run(runner.function, runner.asked) == name_run(function, config):
            return runner.join(title)
        if is_ahead:  # the learner has changed the settings once more
            runner.t_ahead = -AHEAD_S
    runner, cell = Runner(function, config, place), find_cell()
    if cell:
        before = _cells.get(cell)
        if before is not None:
            before.stop.set()
        _cells[cell] = runner
    return runner.join(title)


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
    parents = [registry.base_dir() / name for name in FOLDERS.values()]
    folders = [folder for parent in parents if parent.is_dir() for folder in parent.iterdir()]
    taken = {f.name for f in folders if registry.is_run(f) and registry.find_steps(f)}
    taken |= {entry.tag for entry in registry.walk_adapters(registry.base_dir() / FOLDERS["lora"])}
    stem = re.sub(r"-\d+$", "", tag)
    names = [tag, *(f"{stem}-{n}" for n in range(2, 10_000))]
    return next(name for name in names if name not in taken)

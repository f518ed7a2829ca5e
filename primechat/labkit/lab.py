"""The functions that a lab imports: widgets, models, predictions, exercises, settings, stages and summaries.

Hides: where a lab runs. In a notebook, a stage runs on a thread behind Start and Stop and its settings are a
form; in a script, under torchrun or under pytest, it runs at once and the settings are the command line.
Models are opened once per process. Importing this module never imports torch.
Reference: labs/00_start_here.py uses each function once.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from primechat.checkpoint import registry
from primechat.checkpoint.registry import ModelEntry
from primechat.events import count_noun, describe_bpb
from primechat.exercises import Broken, Exercise, is_stub
from primechat.labkit import memory, start_stop
from primechat.labkit.forms import build_form, read_command
from primechat.labkit.start_stop import in_marimo, open_control, show
from primechat.views.widgets.controls import ExerciseCard, Live, ModelPicker, Notice
from primechat.views.widgets.controls import Prediction as Prediction
from primechat.views.widgets.runs import (
    RunHistory,
    StageControl,
    Summary,
    build_event,
    describe_figures,
)

if TYPE_CHECKING:
    from primechat.model.gpt import GPT
    from primechat.text.tokenizer import Tokenizer

__all__ = [
    "Live",
    "announce",
    "borrow_model",
    "exercise",
    "in_marimo",
    "in_notebook",
    "offer_model",
    "pick_model",
    "predict",
    "settings",
    "show",
    "stage",
    "summary",
]

CACHE_BYTES = 2**31  # weights that stay in memory between cells
# Up to this size of the weights, one thread is as fast as several and leaves the other cores free.
SMALL_BYTES = 2**28


OPENING = "The controls appear in a few seconds: the model is being opened."


def announce(text: str = OPENING) -> Any:
    """Return a line that says what the page is waiting for; call its `end()` once that is ready."""
    return show(Notice(text=text))


def offer_model(first: str = "") -> ModelPicker:
    """Return a model picker that the instruments of a page follow; call its `end()` once they are ready.

    Until then it says what the page is waiting for. The instruments follow the picker by themselves, so
    marimo reruns no cell when another model is chosen.

    Args:
        first: identifier of the model selected at first; "" is the default model.
    """
    return ModelPicker(find_models, first or str(registry.choose_model()), waits=OPENING)


def in_notebook() -> bool:
    """Return whether buttons are shown: in a notebook, or while a lab is rendered as a page."""
    return start_stop.in_notebook() or start_stop.still


def pick_model(families: Sequence[str] = (), *, label: str = "Model", first: str = "") -> Any:
    """Return a picker of the models on this machine; `.identifier` is the chosen one, "" if there is none.

    Args:
        families: families to offer, for example ("sft", "rl") for models that chat; empty offers all.
        label: label of the picker.
        first: identifier of the model selected at first; "" is the default model.
    """
    return show(
        ModelPicker(partial(find_models, families), first or str(registry.choose_model()), label)
    )


def find_models(families: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the entries of a picker for the models of these families, by-products of labs last."""
    entries = [
        entry for entry in registry.list_models() if not families or entry.family in families
    ]
    return [
        {
            "identifier": entry.identifier,
            "about": describe_entry(entry),
            "by_product": entry.by_product,
        }
        for entry in sorted(entries, key=lambda entry: entry.by_product)
    ]


def describe_entry(entry: ModelEntry) -> str:
    """Return a one-line description of a model: size, steps of training, quality and origin."""
    parts = [f"{entry.n_params / 1e6:,.1f} million parameters"] if entry.n_params else []
    steps = entry.steps or entry.snapshots
    if steps:  # models from other projects have none
        parts.append(f"{count_noun(max(steps), 'step')} of training")
    if entry.val_bpb is not None:
        parts.append(describe_bpb(entry.val_bpb, entry.val_tokens, 2))
    if entry.shipped:
        parts.append("ships with primechat")
    elif entry.family == "hf":
        parts.append("another project's")
    elif entry.by_product:
        parts.append("by-product of a lab")
    return " · ".join(parts)


def predict(
    question: str,
    options: Sequence[Any],
    answer: Any,
    *,
    why: str = "",
    within: float = 0.0,
    unit: str = "",
) -> Any:
    """Return a question that the reader answers before the lab reveals the answer.

    The page keeps the score, and a lab that is opened again restores earlier guesses.

    Args:
        options: the possible answers, or two numbers: the ends of a scale.
        answer: the right option or number; measure it, so that it holds for the reader's own model. A
            function is called when the answer is revealed, for example to depend on a choice the reader has
            made by then; after the answer it may also return the values for the braces in `why`.
        why: explanation shown after the reveal.
        within: largest error of a correct guess on a scale; 0 is a twentieth of the scale.
        unit: unit of the number.
    """
    card = Prediction(question, options, answer, why=why, within=within, unit=unit)
    memory.follow_guess(card, memory.name_lab(sys._getframe(1).f_globals))
    return show(card)


def exercise(task: Exercise, attempt: Any = None) -> Any:
    """Return a card that checks an attempt and names the first rule it breaks.

    The card remembers what was solved when the lab was open before.

    Args:
        attempt: the reader's value or function; None, `...` or a stub counts as not attempted.
    """
    card = ExerciseCard(
        title=task.title, task=task.task, hint=task.hint, solution=task.solution_text
    )
    number = memory.name_lab(sys._getframe(1).f_globals)
    if is_stub(attempt) and (start_stop.in_app() or start_stop.still):
        card.message = (
            f"To try it, open the lab for editing: `primechat lab {number or 'NN'} --edit`"
        )
    elif not is_stub(attempt):
        card.state, card.message = "passed", task.praise
        try:
            task.check(attempt)
        except Broken as error:
            card.state, card.rule, card.message = "broken", error.rule, str(error)
        except Exception as error:  # raised by the reader's code: shown on the card
            card.state, card.message = "failed", f"It raised {type(error).__name__}: {error}"
    memory.follow_exercise(card, number, read_source(attempt))
    return show(card)


def read_source(attempt: Any) -> str:
    """Return the source of an attempted function, or the repr of a value; "" if there is no source."""
    if not inspect.isfunction(attempt):
        return repr(attempt)
    try:
        return textwrap.dedent(inspect.getsource(attempt)).strip()
    except (OSError, TypeError):
        return ""


_models: OrderedDict[tuple[Any, ...], tuple[Any, Any, dict[str, Any]]] = OrderedDict()
_lock = threading.Lock()


def borrow_model(identifier: str = "") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return a model, its tokenizer and its metadata, opened once per process.

    All cells share the same objects, so do not modify them. Each call looks for a newer step of the model
    and for newer weights of its adapters.
    """
    # The key changes when a newer step, or another version of an adapter, is on disk.
    name = registry.read_name(identifier)
    key: tuple[Any, ...] = (str(name),)
    if name.family != "hf":
        folder, name = registry.locate_model(name)
        step = max(registry.find_steps(folder), default=None) if name.step is None else name.step
        made = [
            registry.run_dir("lora", tag) / "adapter_model.safetensors" for tag, _ in name.adapters
        ]
        key = (
            folder,
            step,
            name.adapters,
            *(path.stat().st_mtime_ns for path in made if path.exists()),
        )

    # Open it, and drop the models that were used longest ago if memory is short.
    with _lock:
        if key not in _models:
            _models[key] = registry.open_model(str(name))
        _models.move_to_end(key)
        while len(_models) > 1 and sum(map(measure_model, _models.values())) > CACHE_BYTES:
            _models.popitem(last=False)
        opened = _models[key]

    choose_threads(opened)
    return opened


def choose_threads(opened: tuple[Any, Any, dict[str, Any]]) -> None:
    """Set how many threads PyTorch and numpy use for a model: one if it is small.

    For a small model, waiting for other threads makes the computation five times slower.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from primechat.train.autotune import count_cores

    threads = 1 if measure_model(opened) <= SMALL_BYTES else count_cores()
    torch.set_num_threads(threads)  # applies to this thread; stages and chats choose their own
    threadpool_limits(threads, user_api="blas")


def measure_model(opened: tuple[Any, Any, dict[str, Any]]) -> int:
    """Return the size of a model's parameters in bytes."""
    # A model from another project holds its parameters in `network`.
    return sum(
        x.numel() * x.element_size() for x in getattr(opened[0], "network", opened[0]).parameters()
    )


def stage(function: Callable[..., Any], config: Any, *, title: str = "") -> Any:
    """Return a control with Start, Stop and a live view of a stage; `.result` is None until it has run.

    In a script the stage runs at once, and the control is returned when it has ended.

    Args:
        function: the stage; called with the config, `on_event` and `stop`.
        config: the stage's config.
        title: title of the control; "" takes the first sentence of the config's docstring.
    """
    title = title or inspect.getdoc(type(config)).partition(".")[0]  # type: ignore[union-attr]
    if in_notebook():
        return show(open_control(function, config, title))
    from primechat.cli.main import call_stage

    control = StageControl(title, lambda word: None)
    control.result = call_stage(function, config)
    control.state = "done"
    return control


def summary(result: Any, *, title: str = "", notes: Sequence[str] = ()) -> Any:
    """Return a view of the result of a run: figures, curves and samples.

    Args:
        result: what `stage` returned, or its `.result`; None if it has not run yet.
        title: title of the view; "" takes the model's identifier.
        notes: sentences shown with the result.
    """
    state, result = getattr(result, "state", ""), getattr(result, "result", result)

    # Nothing to show yet.
    if result is None:
        waiting = "Nothing has run yet: press Start above" + (
            "." if in_marimo() else ", then run this cell."
        )
        if state in ("running", "stopping"):
            again = "" if in_marimo() else " Run this cell again then."
            waiting = f"The run is under way above. What came of it will stand here once it is done.{again}"
        return show(Summary(title=title or "Result", notes=[waiting]))

    # Replay the run's events.
    log, record = RunHistory(), asdict(result)
    for event in record.pop("events", None) or ():
        log.add(build_event(event))
    view = {**log.describe(), "figures": describe_figures(record)}
    return show(
        Summary(title=title or record.get("identifier", "Result"), view=view, notes=list(notes))
    )


def settings(
    config: Any, simple: Sequence[str] = ("tag", "steps", "seconds"), *, title: str = ""
) -> Any:
    """Return a form that starts from a config; `.config` is the config with the reader's changes.

    In a script the command line overrides the config, for example with --steps 20.

    Args:
        config: the config to start from.
        simple: fields shown at first, nested ones with dots ("runtime.device"); the others are under "more".
        title: title of the form.
    """
    form = build_form(config, simple, title)
    if not in_notebook():
        form.config = read_command(config)
    return show(form)

"""What a lab imports: widgets, a model, a guess, an exercise; settings, a stage and what came of it.

Hides: where a lab runs. In a notebook a stage runs on a thread behind Start and Stop, and its settings are a
form; in a script, under torchrun or pytest it runs at once, and the settings are the command line. Models are
opened once a process. Importing this never imports torch.
Reference: labs/00_start_here.py uses each of these once.
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
    RunLog,
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

CACHE_BYTES = 2**31  # of weights that stay in memory between cells
SMALL_BYTES = (
    2**28
)  # of weights up to which one thread is as fast as several, and does not burn their time


OPENING = "The controls appear in a few seconds: the model is being opened."


def announce(text: str = OPENING) -> Any:
    """Return a line that tells what the page waits for; call its `end()` once that is there."""
    return show(Notice(text=text))


def offer_model(first: str = "") -> ModelPicker:
    """Return a choice of the model that a page's instruments follow; call its `end()` once they are there.

    Until then it tells what the page waits for. As the instruments follow it by themselves, marimo runs no
    cell again when another model is chosen.
    """
    return ModelPicker(find_models, first or str(registry.choose_model()), waits=OPENING)


def in_notebook() -> bool:
    """Tell whether somebody can press buttons, or a page is made that shows them."""
    return start_stop.in_notebook() or start_stop.still


def pick_model(families: Sequence[str] = (), *, label: str = "Model", first: str = "") -> Any:
    """Return a choice among the models on this machine; `.identifier` is the chosen one, "" if there is none.
    `families` are those to offer, for example ("sft", "rl") for models that chat, empty is all; `first` is
    the identifier to begin with, empty the default model.
    """
    return show(
        ModelPicker(partial(find_models, families), first or str(registry.choose_model()), label)
    )


def find_models(families: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the models of these families that are here as a picker shows them, by-products of labs last."""
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
    """Return what a learner wants to know of a model: size, quality, age."""
    parts = [f"{entry.n_params / 1e6:,.1f} million parameters"] if entry.n_params else []
    steps = entry.steps or entry.snapshots
    if steps:  # a model of other people's has none
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
    """Return a question to answer before the lab does; the page keeps the score, and a lab that is opened
    again has the guesses of before.

    Args:
        options: what can be answered, or two numbers: the ends of a scale.
        answer: the right option, or the number; measure it, so that it is true of the learner's model. A
            function is called when the answer is to be shown, for example on what the reader has chosen
            by then; it can return, after the answer, what stands in the braces of `why`.
        why: what is read after the reveal.
        within: how far from the number a guess may be; 0 is a twentieth of the scale.
    """
    card = Prediction(question, options, answer, why=why, within=within, unit=unit)
    memory.follow_guess(card, memory.name_lab(sys._getframe(1).f_globals))
    return show(card)


def exercise(task: Exercise, attempt: Any = None) -> Any:
    """Check an attempt (None, `...` or a stub is none); return a card that names the first rule it breaks.
    It remembers what was solved when the lab was open before.
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
        except Exception as error:  # of the learner's code: told, not raised
            card.state, card.message = "failed", f"It raised {type(error).__name__}: {error}"
    memory.follow_exercise(card, number, read_source(attempt))
    return show(card)


def read_source(attempt: Any) -> str:
    """Return the code of an attempt as it was typed, a value as its repr, else ""."""
    if not inspect.isfunction(attempt):
        return repr(attempt)
    try:
        return textwrap.dedent(inspect.getsource(attempt)).strip()
    except (OSError, TypeError):
        return ""


_models: OrderedDict[tuple[Any, ...], tuple[Any, Any, dict[str, Any]]] = OrderedDict()
_lock = threading.Lock()


def borrow_model(identifier: str = "") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Open a model, or return the one that another cell has opened: the same objects, so change nothing. Each
    call looks for a newer step, of its adapters too.
    """
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
    """Let this thread compute a small model alone, numpy too: threads that wait take five times as long."""
    import torch
    from threadpoolctl import threadpool_limits

    from primechat.train.autotune import count_cores

    threads = 1 if measure_model(opened) <= SMALL_BYTES else count_cores()
    torch.set_num_threads(threads)  # of this thread; stages and chats choose their own
    threadpool_limits(threads, user_api="blas")


def measure_model(opened: tuple[Any, Any, dict[str, Any]]) -> int:
    """Return the bytes of a model's parameters; another project's has them in `network`."""
    return sum(
        x.numel() * x.element_size() for x in getattr(opened[0], "network", opened[0]).parameters()
    )


def stage(function: Callable[..., Any], config: Any, *, title: str = "") -> Any:
    """Return Start and Stop of a stage with a live view; `.result` is what came of it, None until then. The
    stage is called with the config, `on_event` and `stop`; in a script it runs now, and this returns when it
    ends.
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
    """Return what came of a run: figures, curves, samples, of what `stage` returned or of its `.result`, None
    where it has not run yet; an empty title is the model's identifier.
    """
    state, result = getattr(result, "state", ""), getattr(result, "result", result)
    if result is None:
        waiting = "Nothing has run yet: press Start above" + (
            "." if in_marimo() else ", then run this cell."
        )
        if state in ("running", "stopping"):
            again = "" if in_marimo() else " Run this cell again then."
            waiting = f"The run is under way above. What came of it will stand here once it is done.{again}"
        return show(Summary(title=title or "Result", notes=[waiting]))
    log, record = RunLog(), asdict(result)
    for event in record.pop("events", None) or ():
        log.add(build_event(event))
    view = {**log.describe(), "figures": describe_figures(record)}
    return show(
        Summary(title=title or record.get("identifier", "Result"), view=view, notes=list(notes))
    )


def settings(
    config: Any, simple: Sequence[str] = ("tag", "steps", "seconds"), *, title: str = ""
) -> Any:
    """Return a form that starts from a config; `.config` is the config in force. In a script the command line
    overrides it: --steps 20. `simple` are the fields to show at once, parts with dots ("runtime.device"); the
    others are behind "more".
    """
    form = build_form(config, simple, title)
    if not in_notebook():
        form.config = read_command(config)
    return show(form)

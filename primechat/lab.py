"""What a lab imports: show a widget, pick a model, guess before the reveal, try an exercise.

Hides: where a lab runs. The same cell works in marimo, in JupyterLab, in a script and under pytest; a widget
is wrapped where marimo needs it, and models are opened once a process. Importing this never imports torch.
Reference: labs/00_start_here.py uses each of these once.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from primechat import store
from primechat.errors import PrimechatError
from primechat.lessons import Broken, Exercise, is_stub
from primechat.store import ModelEntry
from primechat.views.widgets.controls import ExerciseCard, Live, ModelPicker, Prediction

if TYPE_CHECKING:
    from primechat.model.gpt import GPT
    from primechat.text.tokenizer import Tokenizer

__all__ = ["Live", "borrow_model", "exercise", "in_marimo", "pick_model", "predict", "show"]

CACHE_BYTES = 2**31  # of weights that stay in memory between cells


def in_marimo() -> bool:
    """Tell whether this runs in a marimo notebook, as opposed to Jupyter or a script."""
    marimo = sys.modules.get("marimo")
    return marimo is not None and bool(marimo.running_in_notebook())


def show(widget: Any) -> Any:
    """Return a widget as the present host shows it; its attributes can be read from what is returned.

    Args:
        widget: one of ours, or a plotly FigureWidget.
    """
    return sys.modules["marimo"].ui.anywidget(widget) if in_marimo() else widget


def pick_model(families: Sequence[str] = (), *, label: str = "Model", first: str = "") -> Any:
    """Return a choice among the models on this machine; `.identifier` is the chosen one, "" if there is none.

    Args:
        families: which to offer, for example ("sft", "rl") for models that chat; empty is all.
        label: what stands before the choice.
        first: the identifier to begin with; empty takes the default model.
    """

    def find() -> list[dict[str, str]]:
        entries = [entry for entry in store.list_models() if not families or entry.family in families]
        return [{"identifier": entry.identifier, "about": describe_entry(entry)} for entry in entries]

    return show(ModelPicker(find, first or str(store.choose_model()), label))


def describe_entry(entry: ModelEntry) -> str:
    """Return what a learner wants to know of a model: size, quality, age."""
    step = max(entry.steps or entry.snapshots)
    parts = [f"{entry.n_params / 1e6:,.1f} million parameters", f"{step:,} steps of training"]
    if entry.val_bpb is not None:
        parts.append(f"{entry.val_bpb:.2f} bits per byte")
    return " · ".join([*parts, *(["ships with primechat"] if entry.shipped else [])])


def predict(
    question: str, options: Sequence[Any], answer: Any, *, why: str = "", within: float = 0.0, unit: str = ""
) -> Any:
    """Return a question to answer before the lab does; the page keeps the score.

    Args:
        question: one sentence.
        options: what can be answered, or two numbers: the ends of a scale.
        answer: the right option, or the number; measure it, so that it is true of the learner's model.
        why: what is read after the reveal.
        within: how far from the number a guess may be; 0 is a twentieth of the scale.
        unit: of the number.
    """
    return show(Prediction(question, options, answer, why=why, within=within, unit=unit))


def exercise(task: Exercise, attempt: Any = None) -> Any:
    """Check a learner's attempt and return a card that names the first rule that it breaks.

    Args:
        task: one of a lesson's EXERCISES.
        attempt: a function or a value; None, `...`, or a function whose body is `...`: not tried yet.
    """
    card = ExerciseCard(title=task.title, task=task.task, hint=task.hint, solution=task.solution_text)
    if not is_stub(attempt):
        card.state, card.message = "passed", task.praise
        try:
            task.check(attempt)
        except Broken as error:
            card.state, card.rule, card.message = "broken", error.rule, str(error)
        except Exception as error:  # of the learner's code: told, not raised
            card.state, card.message = "failed", f"It raised {type(error).__name__}: {error}"
    return show(card)


_models: OrderedDict[tuple[Any, ...], tuple[Any, Any, dict[str, Any]]] = OrderedDict()
_lock = threading.Lock()


def borrow_model(identifier: str = "", *, device: str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Open a model, or return the one that another cell has opened: the same objects, so change nothing.

    Args:
        identifier: as for `open_model`; empty is the default model. Each call looks for a newer step.
        device: cpu, mps or cuda.

    Raises:
        PrimechatError: as `open_model`.
    """
    folder, name = store.locate_model(
        store.parse_identifier(identifier) if identifier else store.choose_model()
    )
    step = name.step if name.step is not None else max(store.find_steps(folder), default=None)
    key = (folder, step, device)
    with _lock:
        if key not in _models:
            _models[key] = store.open_model(str(name), device=device)
            while len(_models) > 1 and sum(map(measure_model, _models.values())) > CACHE_BYTES:
                _models.popitem(last=False)
        _models.move_to_end(key)
        return _models[key]


def measure_model(opened: tuple[Any, Any, dict[str, Any]]) -> int:
    """Return the bytes of a model's parameters."""
    return sum(weight.numel() * weight.element_size() for weight in opened[0].parameters())


def explain_error(error: BaseException) -> str:
    """Return an error as a page shows it: ours are sentences, others are named."""
    return str(error) if isinstance(error, PrimechatError) else f"{type(error).__name__}: {error}"

"""Small controls used by all labs: model picker, prediction, exercise, and live view of a function.

Hides: how the result of a function becomes something that a page can draw. One script draws all of them, and
`kind` tells it which. Reference: ipywidgets' `interact`; `Live` is its counterpart for every host.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget

MAX_ROWS = 200


class ModelPicker(Widget):
    """A picker of the models on the machine; its `identifier` is the chosen one.

    By-products of labs are listed only under "more" and are never chosen by default.

    Args:
        find: returns dicts of `identifier`, `about` and optionally `by_product`; called again on request.
        identifier: the model selected at first, if it is found.
        label: label of the picker.
        waits: what the page is waiting for until `end` is called.
    """

    kind = traitlets.Unicode("models").tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    models: Any = traitlets.List().tag(sync=True)
    identifier = traitlets.Unicode("").tag(sync=True)
    waits = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        find: Callable[[], list[dict[str, Any]]],
        identifier: str = "",
        label: str = "Model",
        waits: str = "",
    ) -> None:
        found = find()
        known = [model["identifier"] for model in found]
        usual = [model["identifier"] for model in found if not model.get("by_product")]
        first = identifier if identifier in known else next(iter(usual), "")
        self.find = find
        super().__init__(models=found, identifier=first, label=label, waits=waits)

    def end(self) -> None:
        """Remove the line that says what the page is waiting for."""
        self.waits = ""

    def answer_find(self) -> dict[str, Any]:
        """Look for models again."""
        self.models = self.find()
        return {}


class Notice(Widget):
    """A line that says what the page is waiting for, until `end` is called."""

    kind = traitlets.Unicode("notice").tag(sync=True)
    text = traitlets.Unicode("").tag(sync=True)
    over = traitlets.Bool(False).tag(sync=True)

    def end(self) -> None:
        """Remove the line."""
        self.over = True


class Prediction(Widget):
    """A question whose answer is shown only after a guess; the page keeps the score of the whole lab.

    The answer can be a function, which is called when the answer is revealed. If it returns a second value,
    a text on how the answer was measured, that replaces the braces in `why`.
    """

    kind = traitlets.Unicode("prediction").tag(sync=True)
    question = traitlets.Unicode("").tag(sync=True)
    options: Any = traitlets.List().tag(sync=True)
    scale: Any = traitlets.List().tag(sync=True)
    answer = traitlets.Any(None, allow_none=True).tag(sync=True)
    why = traitlets.Unicode("").tag(sync=True)
    within = traitlets.Float(0.0).tag(sync=True)
    unit = traitlets.Unicode("").tag(sync=True)
    guess = traitlets.Any(None, allow_none=True).tag(sync=True)
    revealed = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        question: str,
        options: Sequence[Any],
        answer: Any,
        *,
        why: str = "",
        within: float = 0.0,
        unit: str = "",
    ) -> None:
        is_scale = (
            isinstance(options, tuple) and len(options) == 2 and not isinstance(options[0], str)
        )
        if is_scale:
            low, high = map(float, options)
            shape: dict[str, Any] = {"scale": [low, high]}
            within = within or (high - low) / 20
        else:
            shape = {"options": [str(option) for option in options]}
        super().__init__(question=question, why=why, within=within, unit=unit, **shape)
        self.find: Callable[[], Any] = answer if callable(answer) else lambda: answer
        if not callable(answer):
            self.answer_settle()

    def recall(self, guess: Any) -> None:
        """Restore an earlier guess with its answer revealed, if it is still a valid choice."""
        if self.options:
            is_one = guess in self.options
        else:
            is_number = isinstance(guess, (int, float)) and not isinstance(guess, bool)
            is_one = is_number and self.scale[0] <= guess <= self.scale[1]
        if is_one:
            self.guess, self.revealed = guess, True

    def answer_settle(self) -> dict[str, Any]:
        """Return the answer and its explanation, computed now if the answer is a function."""
        found = self.find()
        if isinstance(found, tuple):
            found, said = found
            self.why = self.why.replace("{}", said)
        if self.options and str(found) not in self.options:
            raise ValueError(
                f"answer={found!r} must be one of the options {self.options}; correct it."
            )
        self.answer = str(found) if self.options else float(found)
        return {"answer": self.answer, "why": self.why}


class ExerciseCard(Widget):
    """An exercise: the task, the result of the attempt, a hint and a solution.

    `state` is untried, broken (a rule is violated, which is named), failed (the attempt raised an exception),
    passed, or solved (not tried now, but solved before by the code in `kept`).
    """

    kind = traitlets.Unicode("exercise").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    task = traitlets.Unicode("").tag(sync=True)
    state = traitlets.Unicode("untried").tag(sync=True)
    rule = traitlets.Unicode("").tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    kept = traitlets.Unicode("").tag(sync=True)
    hint = traitlets.Unicode("").tag(sync=True)
    solution = traitlets.Unicode("").tag(sync=True)


class Live(Widget):
    """A function with a control for each argument; the result is drawn again after each change.

    Args:
        function: returns a text, a number, a dict (figures by name), a list of dicts (a table), a matplotlib
            figure, or a list of these.
        labels: label of a control by argument; the default is the argument's name.
        lazy: whether to call the function only when the reader scrolls to it.
        controls: control by argument: a text, a bool, a slider `(low, high)` or `(low, high, start)` (in
            whole numbers if all are whole), or a list of choices.
    """

    kind = traitlets.Unicode("live").tag(sync=True)
    controls: Any = traitlets.List().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    output = traitlets.Dict().tag(sync=True)
    seen = traitlets.Bool(True).tag(sync=True)

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        labels: Mapping[str, str] | None = None,
        lazy: bool = False,
        **controls: Any,
    ) -> None:
        specs = [describe_control(name, spec) for name, spec in controls.items()]
        names = labels or {}
        for spec in specs:
            label = names.get(spec["name"], spec["name"].replace("_", " "))
            # Capitalise words, but not a single letter as in a : b.
            spec["label"] = label[:1].upper() + label[1:] if label[1:2].isalpha() else label
        self.function = function
        start = {spec["name"]: spec["start"] for spec in specs}
        super().__init__(controls=specs, values=start, seen=not lazy)
        self.observe(lambda _: self.refresh(), ["values", "seen"])
        self.refresh()

    def refresh(self) -> None:
        """Call the function and show its result, or the message of its exception."""
        if not self.seen:
            return
        values = dict(self.values)
        # The page numbers its changes, so that it knows which one a result belongs to.
        number = values.pop("#", 0)
        try:
            parts = describe_output(self.function(**values))
        except Exception as error:  # any error of the function is shown in its place
            parts = [{"kind": "error", "text": str(error) or type(error).__name__}]
        self.output = {"#": number, "parts": parts}


def describe_control(name: str, spec: Any) -> dict[str, Any]:
    """Return the data that the page needs to draw a control."""
    if isinstance(spec, bool):
        return {"name": name, "form": "toggle", "start": spec}
    if isinstance(spec, str):
        return {"name": name, "form": "text", "start": spec}
    if isinstance(spec, tuple) and len(spec) in (2, 3):
        low, high, start = (*spec, spec[0])[:3]
        whole = all(isinstance(value, int) for value in spec)
        step = 1 if whole else (high - low) / 100
        return {
            "name": name,
            "form": "slider",
            "low": low,
            "high": high,
            "step": step,
            "start": start,
        }
    if isinstance(spec, list) and spec:
        options = [str(item) for item in spec]
        return {"name": name, "form": "select", "options": options, "start": options[0]}
    raise TypeError(
        f"{name}={spec!r} must be a text, a bool, (low, high), (low, high, start) or a list; write one."
    )


def describe_output(value: Any) -> list[dict[str, Any]]:
    """Return the parts of a result for the page, each with its kind."""
    if value is None:
        return []

    # A matplotlib figure.
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", bbox_inches="tight", dpi=144)
        return [{"kind": "image", "data": base64.b64encode(picture.getvalue()).decode()}]

    # Figures by name.
    if isinstance(value, Mapping):
        return [
            {
                "kind": "figures",
                "items": [[str(key), write_value(item)] for key, item in value.items()],
            }
        ]

    # A table, or a list of parts.
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        rows = list(value)
        if rows and all(isinstance(row, Mapping) for row in rows):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[write_value(row.get(key, "")) for key in columns] for row in rows[:MAX_ROWS]]
            return [
                {
                    "kind": "table",
                    "columns": columns,
                    "rows": cells,
                    "left_out": len(rows) - len(cells),
                }
            ]
        return [part for item in rows for part in describe_output(item)]

    return [{"kind": "text", "text": write_value(value)}]


def write_value(value: Any) -> str:
    """Return a value as text, numbers with thousands separators or four digits.

    >>> write_value(1234567), write_value(0.123456), write_value("as it is")
    ('1,234,567', '0.1235', 'as it is')
    """
    if isinstance(value, bool) or value is None:
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)

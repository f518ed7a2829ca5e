"""A config as a form and as a command line, from the dataclass itself: names, types, helps, refusals.

Hides: how a sentence of a refusal finds the field that it is about. Reference: primechat.config.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
import sys
import textwrap
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from primechat.config.model import MATRICES, STUDENT_SIZES
from primechat.config.optim import DECAY_SCHEDULES, ORTHOGONALIZE
from primechat.config.recipes import FULL_RECIPES
from primechat.config.runtime import COMPILE, DEVICES, DTYPES
from primechat.config.stages import COUNTED, DISTANCES, LAYOUTS, LEARN, ROWS
from primechat.errors import ConfigError
from primechat.views.widgets.runs import SettingsForm
from primechat.views.words import name_field

SECTIONS = {
    "": "More settings",
    "base": "The run itself",
    "model": "The model's shape and switches",
    "init": "The first weights",
    "optim": "The optimizer",
    "eval": "How often it is measured and saved",
    "runtime": "The machine",
}
_taken: list[str] = []
_forms: weakref.WeakKeyDictionary[SettingsForm, list[Any]] = (
    weakref.WeakKeyDictionary()
)  # and what each gave
_followers: weakref.WeakKeyDictionary[SettingsForm, list[Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)  # called when a form has other settings
CHOICES = {
    "runtime.device": DEVICES,
    "runtime.dtype": DTYPES,
    "runtime.compile": COMPILE,
    "size": STUDENT_SIZES,
    "loss": DISTANCES,
    "layout": LAYOUTS,
    "learn": LEARN,
    "recipe": FULL_RECIPES,
    "rates": ("nanochat2026", "nanochat2026+init", "quickstart"),
    "params_counted": COUNTED,
    "rows": ROWS,
    "init.matrices": MATRICES,
    "optim.orthogonalize": ORTHOGONALIZE,
    "optim.decay_schedule": DECAY_SCHEDULES,
}


def build_form(config: Any, simple: Sequence[str], title: str) -> SettingsForm:
    """Return a form that starts from a config; `simple` are the fields to show at once."""
    fields = list(list_fields(config))
    start = {name: value for name, value, _, _ in fields}
    order, kind_name = {name: i for i, name in enumerate(simple)}, type(config).__name__
    shown = [
        {
            "name": name,
            "title": name_field(name, kind_name),
            "simple": name in order,
            "help": "" if text.rstrip(".") == name_field(name, kind_name) else text,
            "section": SECTIONS.get(
                part := name.rpartition(".")[0].rpartition(".")[2], part.capitalize()
            ),
            "form": name_form(name, kind),
            "choices": list(CHOICES.get(name, ())),
        }
        for name, _, kind, text in sorted(fields, key=lambda field: order.get(field[0], len(order)))
    ]

    def change(draft: dict[str, Any]) -> dict[str, Any]:
        try:
            new = build_config(config, draft)
        except ConfigError as error:
            return {"fault": str(error), "field": find_field(str(error), list(start))}
        form.config = new
        _forms[form].append(new)
        for follower in list(_followers.get(form, ())):
            follower()
        values = {name: value for name, value, _, _ in list_fields(new)}
        return {"values": values, "command": write_command(new)}

    form = SettingsForm(
        change,
        title=title or "Settings",
        fields=shown,
        start=start,
        values=dict(start),
        command=write_command(config),
    )
    form.config = config
    _forms[form] = [config]
    return form


def renew_config(config: Any) -> Any:
    """Return what the form that gave this very config has in force now; a config of no form is returned."""
    forms = (form for form, given in list(_forms.items()) if any(one is config for one in given))
    return next((form.config for form in forms), config)


def follow_form(config: Any, follower: Callable[[], None]) -> None:
    """Call something whenever the form that gave this very config has other settings in force."""
    for form, given in list(_forms.items()):
        if any(one is config for one in given):
            _followers.setdefault(form, []).append(follower)


def name_form(name: str, kind: Any) -> str:
    """Return how a field is entered."""
    if name in CHOICES:
        return "choice"
    return "toggle" if kind is bool else "number" if kind in (int, float) else "text"


def find_field(sentence: str, names: Sequence[str]) -> str:
    """Return the field that a refusal begins with, empty where it names none of them.

    >>> find_field("model.n_embd=770 must be divisible by 6; try 768.", ["steps", "model.n_embd"])
    'model.n_embd'
    """
    match = re.match(r"[\w.]+", sentence)
    said = match[0] if match else ""
    near = [name for name in names if name.rpartition(".")[2] == said.rpartition(".")[2]]
    return said if said in names else near[0] if near else ""


def list_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield name, value, type and help of each plain field of a config, parts included."""
    types, texts = typing.get_type_hints(type(config)), read_helps(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from list_fields(value, f"{name}.")
        elif isinstance(value, (str, int, float)):
            yield name, value, types[item.name], texts.get(item.name, "")


def read_helps(cls: type) -> dict[str, str]:
    """Return the help of each field: the string below it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    pairs = zip(body, body[1:], strict=False)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def build_config(config: Any, draft: Mapping[str, Any], prefix: str = "") -> Any:
    """Return a config with a form's values in it.

    Raises:
        ConfigError: a value is none that its field can have.
    """
    types, changes = typing.get_type_hints(type(config)), {}
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            changes[item.name] = build_config(value, draft, f"{name}.")
        elif name in draft:
            changes[item.name] = read_value(name, draft[name], types[item.name])
    return dataclasses.replace(config, **changes)


def read_value(name: str, value: Any, kind: Any) -> Any:
    """Return what somebody typed as the type that a field has.

    >>> read_value("steps", "1,000", int), read_value("seconds", "2.5", float), read_value("tag", " d4 ", str)
    (1000, 2.5, 'd4')
    """
    if kind is bool or not isinstance(value, str):
        return value
    text = value.strip()
    if kind is str:
        return text
    try:
        # 1,000 as this page writes it; a comma elsewhere is none of ours: 0,5 would become 5
        return kind(text.replace(",", "") if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", text) else text)
    except ValueError:
        what, one = ("a whole number", "20") if kind is int else ("a number", "0.5")
        raise ConfigError(f"{name}={text!r} must be {what}; write one, such as {one}.") from None


def write_command(config: Any) -> str:
    """Return the command line that runs a config; only what differs from its defaults is named."""
    from primechat.cli.main import STAGES

    verb = next(
        (verb for verb, (_, name, _) in STAGES.items() if name == type(config).__name__), None
    )
    if verb is None:
        return repr(config)
    usual = {name: value for name, value, _, _ in list_fields(type(config)())}
    words = ["primechat", verb]
    for name, value, kind, _ in list_fields(config):
        if usual.get(name) != value:
            part, dot, last = name.rpartition(".")
            flag = f"{part}{dot}{'' if value or kind is not bool else 'no_'}{last}"
            words += [f"--{flag}"] if kind is bool else [f"--{flag}", str(value)]
    return shlex.join(words)


def read_command(config: Any) -> Any:
    """Return a config with the flags of the script that is running; unchanged elsewhere.

    Raises:
        ConfigError: a flag has no such value.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    is_twin = (
        sys._getframe(2).f_globals.get("__name__") == "__main__"
    )  # whose cells are the script itself
    if not (is_twin or "marimo" in sys.modules) or not script or _taken:
        return config
    if Path(script).resolve() != Path(sys.argv[0]).resolve():
        return config
    _taken.append(script)  # the flags are those of a lab's first form
    from primechat.cli.script import read_flags

    return read_flags(config)

"""Configs as forms and as command lines, derived from the dataclass: names, types, help texts and errors.

Hides: how an error message is matched to the field that it is about. Reference: primechat.config.
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
# Every config that each form has given out.
_forms: weakref.WeakKeyDictionary[SettingsForm, list[Any]] = weakref.WeakKeyDictionary()
# Functions to call when the settings of a form change.
_followers: weakref.WeakKeyDictionary[SettingsForm, list[Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)
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
    """Return a form that starts from a config; `simple` names the fields to show at first."""
    # The fields, those in `simple` first and in its order.
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

    # Remember which configs the form gave, for `renew_config`.
    form.config = config
    _forms[form] = [config]
    return form


def renew_config(config: Any) -> Any:
    """Return the current config of the form that gave this config object, or the config if there is none."""
    forms = (form for form, given in list(_forms.items()) if any(one is config for one in given))
    return next((form.config for form in forms), config)


def follow_form(config: Any, follower: Callable[[], None]) -> None:
    """Call a function whenever the settings change in the form that gave this config object."""
    for form, given in list(_forms.items()):
        if any(one is config for one in given):
            _followers.setdefault(form, []).append(follower)


def name_form(name: str, kind: Any) -> str:
    """Return the kind of input for a field: choice, toggle, number or text."""
    if name in CHOICES:
        return "choice"
    return "toggle" if kind is bool else "number" if kind in (int, float) else "text"


def find_field(sentence: str, names: Sequence[str]) -> str:
    """Return the field that an error message begins with, or "" if it names none.

    >>> find_field("model.n_embd=770 must be divisible by 6; try 768.", ["steps", "model.n_embd"])
    'model.n_embd'
    """
    match = re.match(r"[\w.]+", sentence)
    said = match[0] if match else ""
    near = [name for name in names if name.rpartition(".")[2] == said.rpartition(".")[2]]
    return said if said in names else near[0] if near else ""


def list_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield name, value, type and help of each plain field of a config, nested configs included."""
    types, texts = typing.get_type_hints(type(config)), read_helps(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from list_fields(value, f"{name}.")
        elif isinstance(value, (str, int, float)):
            yield name, value, types[item.name], texts.get(item.name, "")


def read_helps(cls: type) -> dict[str, str]:
    """Return the help text of each field, the string below it in the source."""
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
    """Return a config with the values of a form.

    Raises:
        ConfigError: a value is not allowed for its field.
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
    """Return a typed value converted to the type of its field.

    >>> read_value("steps", "1,000", int), read_value("seconds", "2.5", float), read_value("tag", " d4 ", str)
    (1000, 2.5, 'd4')
    """
    if kind is bool or not isinstance(value, str):
        return value
    text = value.strip()
    if kind is str:
        return text
    try:
        # Accept 1,000 as this page writes it, but no other comma: 0,5 would become 5.
        return kind(text.replace(",", "") if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", text) else text)
    except ValueError:
        what, one = ("a whole number", "20") if kind is int else ("a number", "0.5")
        raise ConfigError(f"{name}={text!r} must be {what}; write one, such as {one}.") from None


def write_command(config: Any) -> str:
    """Return the command line that runs a config, with flags for everything that differs from the defaults.

    A config of no verb is returned as its repr.
    """
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
    """Return a config with the flags of the lab that runs as a script; unchanged elsewhere.

    Raises:
        ConfigError: a flag has a value that is not allowed.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    # The cells of an exported twin are the script itself; a marimo file runs its cells through marimo.
    is_twin = sys._getframe(2).f_globals.get("__name__") == "__main__"
    if not (is_twin or "marimo" in sys.modules) or not script or _taken:
        return config
    if Path(script).resolve() != Path(sys.argv[0]).resolve():
        return config
    _taken.append(script)  # the flags apply to the first form of a lab
    from primechat.cli.script import read_flags

    return read_flags(config)

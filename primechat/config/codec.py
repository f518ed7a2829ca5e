"""Conversion of configs to JSON and back, and the first difference between two configs.

Hides: how nested dataclasses, tuples and schema versions are stored in JSON. What older files mean is defined
in history.py.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from primechat.config.history import rename_fields, upgrade_settings
from primechat.config.runtime import show_value
from primechat.errors import ConfigError

SCHEMA_VERSION = 2
READABLE = (1, 2)

Config = TypeVar("Config")


def encode_config(config: Any) -> dict[str, Any]:
    """Return a config as JSON-ready data, with the name of its class and a schema version.

    >>> from primechat.config import GPTConfig
    >>> decode_config(encode_config(GPTConfig.classic(4)), GPTConfig) == GPTConfig.classic(4)
    True
    """
    return {"schema": SCHEMA_VERSION, "class": type(config).__name__, **dataclasses.asdict(config)}


def decode_config(
    data: Any, cls: type[Config], where: str = "config.json", schema: int = SCHEMA_VERSION
) -> Config:
    """Return a config rebuilt from JSON data.

    Args:
        data: the object in the file, as JSON gives it.
        cls: class of the config.
        where: name of the source in errors.
        schema: schema of the file, for nested data that do not name it themselves.

    Raises:
        ConfigError: a field is unknown, a type is wrong, or the schema is newer than this version.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where} holds a {type(data).__name__}, it must hold an object of settings; restore it from a "
            "backup."
        )
    schema = data.get("schema", schema)
    if schema not in READABLE:
        raise ConfigError(
            f"{where} has schema {schema!r}, this version reads up to {SCHEMA_VERSION}; update primechat."
        )

    # Bring an older file up to date.
    data = rename_fields(data, cls.__name__)
    if schema == 1:
        data = upgrade_settings(data, cls.__name__)

    # Decode each field.
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("schema", "class"):
            continue
        if key not in types:
            raise ConfigError(
                f"{where} has the setting {key!r}, {cls.__name__} has no such field; remove it or update "
                "primechat."
            )
        values[key] = decode_value(value, types[key], f"{where}: {key}", schema)
    return cls(**values)


def decode_value(value: Any, kind: Any, where: str, schema: int = SCHEMA_VERSION) -> Any:
    """Return a JSON value converted to the type of its field; raise a ConfigError if that is impossible."""
    if dataclasses.is_dataclass(kind):
        return decode_config(value, typing.cast(type, kind), where, schema)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={show_value(value)} must be a list; write [ ] around it.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(
                f"{where}={show_value(value)} is too large for a number; correct it."
            ) from None
    if kind in (int, float, str, bool) and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise ConfigError(
            f"{where}={show_value(value)} is a {type(value).__name__}, it must be a {kind.__name__}; "
            "correct it."
        )
    return value


def find_difference(
    old: Any, new: Any, ignore: tuple[str, ...] = (), prefix: str = ""
) -> str | None:
    """Return the first difference between two configs of one class as `field: old != new`, or None."""
    for item in dataclasses.fields(old):
        name, a, b = prefix + item.name, getattr(old, item.name), getattr(new, item.name)
        if name in ignore or a == b:
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            inner = find_difference(a, b, ignore, name + ".")
            if inner:
                return inner
            continue
        return f"{name}: {a!r} != {b!r}"
    return None

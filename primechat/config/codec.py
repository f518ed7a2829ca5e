"""Configurations as JSON and back, and the first difference between two.

Hides: how nested dataclasses, tuples and schema versions travel through JSON.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from primechat.errors import ConfigError

SCHEMA_VERSION = 1

Config = TypeVar("Config")


def encode_config(config: Any) -> dict[str, Any]:
    """Return a config as JSON-ready data, with its class's name and a schema version.

    >>> from primechat.config import GPTConfig
    >>> decode_config(encode_config(GPTConfig.classic(4)), GPTConfig) == GPTConfig.classic(4)
    True
    """
    return {"schema": SCHEMA_VERSION, "class": type(config).__name__, **dataclasses.asdict(config)}


def decode_config(data: Any, cls: type[Config], where: str = "config.json") -> Config:
    """Rebuild a config from JSON data; `where` is how errors name the source.

    Raises:
        ConfigError: an unknown field, a wrong type, or a newer schema.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where} holds a {type(data).__name__}, it must hold an object of settings; restore it from a "
            "backup."
        )
    if data.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ConfigError(
            f"{where} has schema {data['schema']!r}, this version reads {SCHEMA_VERSION}; update primechat."
        )
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
        values[key] = decode_value(value, types[key], f"{where}: {key}")
    return cls(**values)


def decode_value(value: Any, kind: Any, where: str) -> Any:
    """Bring one JSON value to its field's type, or refuse it."""
    if dataclasses.is_dataclass(kind):
        return decode_config(value, typing.cast(type, kind), where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={value!r} must be a list; write [ ] around it.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise ConfigError(
            f"{where}={value!r} is a {type(value).__name__}, it must be a {kind.__name__}; correct it."
        )
    return value


def find_difference(
    old: Any, new: Any, ignore: tuple[str, ...] = (), prefix: str = ""
) -> str | None:
    """Name the first field in which two configs of one class differ, as `field: old != new`, or None."""
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

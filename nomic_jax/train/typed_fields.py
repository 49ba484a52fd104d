"""Frozen dataclasses from mappings: every field is known, present, and of its declared type."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

# "      name, name: text", which goes on in lines that are indented by two more.
_ATTRIBUTE = re.compile(r"^ {6}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


class ConfigurationError(ValueError):
    """A field that does not exist or a value that cannot work; the message says what to write instead."""


def build(cls: type, values: Mapping[str, Any], where: str, known: Mapping[str, type] | None = None) -> Any:
    """An instance of the dataclass ``cls`` with ``values`` as its fields, each checked against its annotation.

    Args:
      cls: a dataclass; its fields may be dataclasses too.
      values: field -> value, nested like the dataclasses; from a ConfigDict, or from JSON.
      where: the name of this group of fields in errors, such as "config.optim".
      known: field -> the type to use instead of its annotation.

    Raises:
      ConfigurationError: an unknown or missing field, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls) | dict(known or {})
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {where}.{close[0]}?" if close else f"; its fields are {', '.join(fields)}"
            raise ConfigurationError(f"{where} has no field {name!r}{hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigurationError(f"{where}.{name} is missing")
    try:
        return cls(**arguments)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def paths_of(cls: type) -> list[str]:
    """Returns the fields of a dataclass, such as "optim.lr", also those of all dataclasses that a field may have."""
    return list(meanings_of(cls))


def meanings_of(cls: type) -> dict[str, str]:
    """Returns field ("optim.lr") -> its text under ``Attributes`` in the docstring of its dataclass; "" without one."""
    explained: dict[str, str] = {}
    for names, text in _ATTRIBUTE.findall((cls.__doc__ or "").partition("Attributes:")[2]):
        explained |= dict.fromkeys(names.split(", "), " ".join(text.replace("``", "").split()))
    meanings: dict[str, str] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if hint is typing.ClassVar:
            continue
        inner = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
        inner = [kind for kind in inner if dataclasses.is_dataclass(kind)]
        for kind in inner:
            for path, text in meanings_of(kind).items():
                meanings[f"{name}.{path}"] = meanings.get(f"{name}.{path}") or text
        if not inner:
            meanings[name] = explained.get(name, "")
    return meanings


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigurationError(f"{where} should be a group of fields")
        return build(hint, dict(value.items()), where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigurationError(f"{where} is {value!r}; write one of {', '.join(map(str, allowed))}")
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), where)
    if origin is tuple:  # a list, in the config.json of a run
        if isinstance(value, str) and typing.get_args(hint)[0] is str:  # on a command line
            value = [name.strip() for name in value.split(",") if name.strip()]
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where} is {value!r}; it should be a tuple")
        return tuple(_convert(item, typing.get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not hint:
        raise ConfigurationError(f"{where} is {value!r}; it should be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigurationError(f"{where} is {value}; it should be a finite number")
    return value

"""Values of YAML as the types of the fields that they are for."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from typing import Any, Literal

from mmref.errors import ConfigError

UNIONS = (typing.Union, types.UnionType)


def cast_value(name: str, value: Any, hint: Any, path: str) -> Any:
    """A value as its field's type. Raises ConfigError."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in UNIONS:
        for part in parts:
            with contextlib.suppress(ConfigError):
                return cast_value(name, value, part, path)
    elif kind is Literal:
        if any(type(value) is type(word) and value == word for word in parts):
            return value
        raise ConfigError(f"{path}: `{name}` is one of {', '.join(map(str, parts))}; found {value!r}.")
    elif kind is list and isinstance(value, list):
        return [cast_value(name, each, parts[0], path) for each in value]
    elif kind is dict and isinstance(value, dict):
        return {cast_value(name, key, parts[0], path): cast_value(name, each, parts[1], path) for key, each in value.items()}
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3, without a point, as a string
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint is Any or type(value) is hint:
        return value
    raise ConfigError(f"{path}: `{name}` takes {_in_words(hint)}, found {value!r}.")


def _in_words(hint: Any) -> str:
    """`all or int` of a field that takes either, `list[float]` of a list."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in UNIONS:
        return " or ".join(map(_in_words, parts))
    if kind is Literal:
        return "/".join(map(str, parts))
    if hint is types.NoneType:
        return "null"
    return f"{hint.__name__}[{', '.join(map(_in_words, parts))}]" if parts else str(hint.__name__)

"""The language of filters: `price>=10`, `color in red,blue`, read into conditions and held against typed columns.

A filter is one of

    COLUMN=VALUE  COLUMN!=VALUE  COLUMN<VALUE  COLUMN<=VALUE  COLUMN>VALUE  COLUMN>=VALUE
    COLUMN~TEXT                      the text contains this, whatever the case of its letters
    COLUMN in VALUE,VALUE
    COLUMN is missing                COLUMN is not missing

White space around an operator means nothing. A name or value in double quotes is taken as it is, with `""` for a quotation mark
in it. An item without a value meets no condition but `is missing`, as in SQL. `Condition` is the form that other code translates.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmref.errors import FilterError, UnknownColumnError

Op = Literal["=", "!=", "<", "<=", ">", ">=", "~", "in", "missing", "present"]
Kind = Literal["text", "number", "date", "time", "boolean"]
Value = str | int | float | bool | date | datetime

COMPARED = ("=", "!=", "<", "<=", ">", ">=", "~")  # with one value, by the signs that are written
ORDERED = ("<", "<=", ">", ">=")
EXAMPLES: dict[Kind, str] = {
    "text": "red", "number": "9.5", "date": "2024-05-01", "time": "2024-05-01T18:30", "boolean": "true",
}  # fmt: skip
HOLDS: dict[Kind, str] = {"text": "texts", "number": "numbers", "date": "dates", "time": "times", "boolean": "true and false"}
ALL = "=, !=, <, <=, >, >=, ~ (contains), in, is missing, is not missing"

_SIGNS = r"[=<>!~]+"
_QUOTED = r'"(?:[^"]|"")*"'
# Runs of white space are taken whole, of a text without any at its ends: else a thousand spaces are tried in every division.
_FILTER = re.compile(
    rf"(?P<column>{_QUOTED}|\S.*?)(?:\s*+(?P<sign>{_SIGNS})(?P<value>.*)|\s++in\s++(?P<several>.+)|\s++is\s++(?P<no>not\s++)?missing)",
    re.DOTALL,
)
_ONE_OF_SEVERAL = re.compile(rf"\s*+({_QUOTED}|[^,]*+)\s*+(?=,|\Z)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Condition:
    """What a column of an item must hold. As read the values are texts; from `typed` on they are of the column's type: a time is
    a `datetime`, and a `date` held against a column of times means that whole day."""

    column: str
    op: Op
    values: tuple[Value, ...] = ()  # one; of `in` one or more; of `missing` and `present` none


Filter = Mapping[str, Any] | str | Condition
"""A filter as it is written, or columns with the value of each: a single one, or any list, array or column of several."""
Where = Filter | Iterable[Filter]
"""Conditions that an item must meet together."""


def read_where(where: Where | None) -> tuple[Condition, ...]:
    """All conditions of filters; none of an empty text. Raises FilterError."""
    if where is None or (isinstance(where, str) and not where):
        return ()
    if isinstance(where, str | Condition | Mapping) or not isinstance(where, Iterable):
        return _conditions(where)
    return tuple(condition for one in where for condition in _conditions(one))


def _conditions(one: Filter) -> tuple[Condition, ...]:
    if isinstance(one, Condition):
        return (one,)
    if isinstance(one, str):
        return (read_filter(one),)
    if not isinstance(one, Mapping):
        raise FilterError(f"{one!r:.100} is no filter: give a text such as 'price<20', or a mapping such as {{'color': 'red'}}.")
    return tuple(_of_column(str(name), _plain(value)) for name, value in one.items())


def _of_column(name: str, value: Any) -> Condition:
    if _is_missing(value):
        return Condition(name, "missing")
    single = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    return Condition(name, "=", (value,)) if single else Condition(name, "in", tuple(value))


def _plain(value: Any) -> Any:
    """What NumPy, pandas and others hold, as Python has it."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype == "datetime64[ns]":
        value = value.astype("datetime64[us]")  # as numbers is how `tolist` gives the finer ones
    return value.tolist() if hasattr(value, "tolist") else value


def _is_missing(value: Any) -> bool:
    """Whether it is None, or what pandas has in its place: NaN, NaT."""
    return value is None or (isinstance(value, float | datetime) and value != value)


def read_filter(text: str) -> Condition:
    """One filter as it is written. Raises FilterError."""
    found = _FILTER.fullmatch(text.strip())
    if found is None:
        raise FilterError(f"the filter {text[:100]!r} is not of the form COLUMN=VALUE. It may have one of {ALL}.")
    column, sign = _unquoted(found["column"]), found["sign"]
    if found["several"] is not None:
        return Condition(column, "in", _several(found["several"]))
    if sign is None:
        return Condition(column, "present" if found["no"] else "missing")
    if sign not in COMPARED:
        raise FilterError(
            f"the filter {text[:100]!r} has the unknown operator {sign!r}. Known are {ALL}. A value that begins with such a sign "
            f'is put into quotation marks: {column[:50]}="{found["value"].strip()[:50]}".'
        )
    return Condition(column, cast(Op, sign), (_unquoted(found["value"]),))


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1].replace('""', '"') if re.fullmatch(_QUOTED, text, re.DOTALL) else text


def _several(text: str) -> tuple[str, ...]:
    """Values with commas between them."""
    found, at = [], -1
    while at < len(text):
        one = _ONE_OF_SEVERAL.match(text, at + 1)
        assert one is not None  # the second of its forms takes anything
        found.append(_unquoted(one[1]))
        at = one.end()
    return tuple(found)


# -- types -----------------------------------------------------------------------------------------------------------


def kind_of(type_: pa.DataType) -> Kind:
    """What a column holds."""
    if pa.types.is_boolean(type_):
        return "boolean"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    if pa.types.is_date(type_):
        return "date"
    return "time" if pa.types.is_timestamp(type_) else "text"


def check_column(name: str, columns: Sequence[str], index: str) -> None:
    """Raise UnknownColumnError, which names the nearest column, where an index has no column to filter or sort by."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, 1, 0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(columns) or "none"
        raise UnknownColumnError(f"{index} has no column {name[:100]!r} to filter or sort by. It has: {known}.{hint}")


def typed(conditions: Sequence[Condition], columns: Mapping[str, pa.DataType], index: str) -> tuple[Condition, ...]:
    """Conditions with values of their columns' types.

    Args:
        columns: that may be named, with their types.
        index: its name, for messages.

    Raises:
        UnknownColumnError: there is no such column. FilterError: a value does not fit its column, or an operator does not.
    """
    found = []
    for one in conditions:
        check_column(one.column, list(columns), index)
        type_ = columns[one.column]
        kind = kind_of(type_)
        if one.op == "~" and kind != "text":
            raise FilterError(f"{one.column} holds {HOLDS[kind]}, and ~ looks into texts: compare it by =, or by < and >.")
        if one.op in ORDERED and kind == "boolean":
            raise FilterError(f"{one.column} holds {HOLDS[kind]}, which have no order: write {one.column}=true.")
        if one.op == "in" and not one.values:
            raise FilterError(f"{one.column} is to be one of no values: write such as {one.column} in {EXAMPLES[kind]}.")
        values = tuple(_fit(one, value, kind, type_) for value in one.values)
        if kind == "time" and len({isinstance(value, datetime) for value in values}) > 1:
            raise FilterError(f"{one.column} is to be one of days and times: give days alone, or times alone.")
        found.append(replace(one, values=values))
    return tuple(found)


def _fit(condition: Condition, value: Any, kind: Kind, type_: pa.DataType) -> Value:
    """A value as its column holds it. Raises FilterError."""
    value = _plain(value)
    said = str(value).strip()
    if _is_missing(value):
        raise FilterError(f"{condition.column} is to be one of several, {said} among them: `is missing` finds what has no value.")
    if isinstance(value, Iterable) and not isinstance(value, str):
        raise FilterError(f"{condition.column} is compared with texts, numbers, dates or times, not with {said[:100]}.")
    try:
        if kind == "text":
            text = str(value).encode(errors="replace").decode()  # half a surrogate pair equals nothing
            if condition.op in ORDERED and (_NUMBER.fullmatch(text) or isinstance(value, int | float)):
                raise FilterError(
                    f"{condition.column} holds texts, whose order is not that of numbers ('9' comes behind '10'): ranges of "
                    "numbers need a column of numbers in the table that the index is made of."
                )
            return text
        if kind == "boolean":
            return {"true": True, "false": False}[said.lower()]
        if kind == "number":
            return _number(said)
        if kind == "date":
            return date.fromisoformat(said)
        return _time(value if isinstance(value, date) else said, type_)
    except (KeyError, ValueError, OverflowError):  # the last of a time that has no place in UTC
        example = f"{condition.column}{condition.op if condition.op in COMPARED else '='}{EXAMPLES[kind]}"
        raise FilterError(
            f"{condition.column} holds {HOLDS[kind]}, and {said[:100]!r} is not of them: write such as {example}."
        ) from None


def _number(text: str) -> int | float:
    if _WHOLE.fullmatch(text) and abs(whole := int(text)) < 2**63:
        return whole
    if not _NUMBER.fullmatch(text) or not math.isfinite(found := float(text)):
        raise ValueError
    return found


def _time(given: str | date, type_: pa.DataType) -> date | datetime:
    """A day, or a time, in UTC where the column has a time zone."""
    if isinstance(given, str):
        given = date.fromisoformat(given) if len(given) <= 10 else datetime.fromisoformat(given)
    if not isinstance(given, datetime):
        return given
    if type_.tz is None:
        if given.tzinfo is not None:  # nobody knows where the clocks of the column stood
            raise ValueError
        return given
    return given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)


# -- matching --------------------------------------------------------------------------------------------------------


def matches(conditions: Sequence[Condition], items: pa.Table) -> NDArray[np.bool_]:
    """(n,) whether each item meets all conditions, whose values are `typed`."""
    parts = [pc.fill_null(_meets(items[one.column], one), False) for one in conditions]
    if not parts:
        return np.ones(len(items), bool)
    return np.asarray(functools.reduce(pc.and_, parts))


_COMPARE = {
    "=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip


def _meets(column: Any, one: Condition) -> Any:
    """Whether each cell of a column meets a condition; null where it holds nothing."""
    kind = kind_of(column.type)
    if one.op in ("missing", "present"):
        missing = pc.is_null(column)
        if kind == "text":
            missing = pc.or_(missing, pc.fill_null(pc.equal(pc.cast(column, pa.string()), ""), False))
        return missing if one.op == "missing" else pc.invert(missing)
    if kind == "text":
        column = pc.cast(column, pa.string())
    elif kind == "number" and any(isinstance(value, float) for value in one.values):
        column = pc.cast(column, pa.float64(), safe=False)
    elif kind == "time" and not isinstance(one.values[0], datetime):
        column = pc.cast(column, pa.date32(), safe=False)
    if one.op == "~":
        return pc.match_substring(column, str(one.values[0]), ignore_case=True)
    if one.op == "in":
        return pc.is_in(column, value_set=_array(one.values, column.type))
    return _COMPARE[one.op](column, _array(one.values, column.type)[0])


def _array(values: Sequence[Value], type_: pa.DataType) -> Any:
    """Values in the widest type of the column's kind."""
    if pa.types.is_integer(type_):
        type_ = pa.int64()
    elif pa.types.is_floating(type_):
        values = [float(cast(float, value)) for value in values]  # as the column is: whole numbers beyond 2**53 are rounded
    return pa.array(values, type_)

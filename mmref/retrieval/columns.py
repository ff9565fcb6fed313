"""Metadata columns of an index: the type that the cells of a source tell, and their values as JSON has them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})?")
# A number as programs write it. An id with a zero before it (007), or one of more digits than a number holds, stays a text.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?")
TEXTS = ("split", "caption")  # whatever they look like


def metadata_column(name: str, values: Sequence[Any], plain: bool = False) -> pa.Array:
    """Cells of a column, None where they are missing, in one type: that of the values; dates and times where each text is one in
    the form of ISO 8601; text, as it is written, where they are of several, or no type holds them all.

    Args:
        plain: the source has texts alone (CSV): where each is a number, they are numbers.
    """
    if name in TEXTS:
        return _texts(values)
    known = [value for value in values if value is not None]
    of_texts = bool(known) and all(isinstance(value, str) for value in known)
    cells = [float(value) if isinstance(value, Decimal) else value for value in values]
    try:
        array = _array(_read(cells, plain) if of_texts else cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        array = _texts(cells)
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


def _texts(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _array(values: Sequence[Any]) -> pa.Array:
    """Raises ArrowInvalid for times with and without a time zone, or dates and times, in one column; OverflowError for a time
    that has no place in UTC: before the year 1 or behind 9999."""
    known = [value for value in values if value is not None]
    times = [value for value in known if isinstance(value, datetime)]
    if not times:
        return pa.array(values)
    zoned = {value.tzinfo is not None for value in times}
    if len(times) < len(known) or len(zoned) > 1:
        raise pa.ArrowInvalid("of several kinds")
    if zoned == {False}:
        return pa.array(values, pa.timestamp("us"))
    # Arrow would take a time of the year 10000, and fail where it is read.
    return pa.array([None if value is None else value.astimezone(UTC) for value in values], pa.timestamp("us", "UTC"))


def _read(values: Sequence[Any], plain: bool) -> Sequence[Any]:
    """Texts as what all of them are, else as they were."""
    kinds: list[tuple[re.Pattern[str], Any]] = [(_DAY, date.fromisoformat), (_TIME, datetime.fromisoformat)]
    if plain:
        kinds.append((_NUMBER, _number))
    for form, read in kinds:
        if all(value is None or form.fullmatch(value) for value in values):
            try:
                return [None if value is None else read(value) for value in values]
            except ValueError:  # the 31st of February
                return values
    return values


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def to_plain(value: Any) -> Any:
    """A value as JSON can hold it: dates and times in the form of ISO 8601."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, date):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)

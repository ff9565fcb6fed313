"""Filters in the SQL that engines have in common, as `mmref.retrieval.filters.matches` understands them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime

from mmref.retrieval.filters import ORDERED, Condition, Value
from mmref.retrieval.stores.store import Conditions


@dataclass(frozen=True)
class Dialect:
    """What engines write each in a way of their own: names of columns, values, and the types of texts and of numbers.

    Args:
        by_code_points: what stands behind a column of texts so that their order is that of their code points, as in the index;
            empty where the engine knows no other.
    """

    column: Callable[[str], str]
    value: Callable[[Value], str]
    text: str
    double: str
    by_code_points: str = ""


def where_clause(conditions: Conditions, dialect: Dialect) -> str:
    """What stands behind WHERE; values are written in the order of the clause."""
    return " AND ".join(_clause(one, dialect) for one in conditions) or "TRUE"


def _clause(one: Condition, dialect: Dialect) -> str:
    column = dialect.column(one.column)
    if one.op in ("missing", "present"):
        missing = f"({column} IS NULL OR CAST({column} AS {dialect.text}) = '')"
        return missing if one.op == "missing" else f"NOT {missing}"
    first = one.values[0]
    if one.op == "~":
        return f"strpos(lower({column}), {dialect.value(str(first).lower())}) > 0"
    if one.op in ORDERED and isinstance(first, str):
        column += dialect.by_code_points
    elif any(isinstance(value, float) for value in one.values):
        column = f"CAST({column} AS {dialect.double})"
    elif isinstance(first, date) and not isinstance(first, datetime):
        column = f"CAST({column} AS date)"  # of a time: that whole day
    if one.op == "in":
        return f"{column} IN ({', '.join(map(dialect.value, one.values))})"
    return f"{column} {'<>' if one.op == '!=' else one.op} {dialect.value(first)}"


def literal(value: Value) -> str:
    """A value, where an engine takes no parameters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, datetime):
        return f"timestamp '{value.isoformat(sep=' ')}'"
    if isinstance(value, date):
        return f"date '{value.isoformat()}'"
    return "'" + value.replace("'", "''") + "'"

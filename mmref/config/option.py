"""What a field of the config says of itself beside its type: bounds, unit, and whether it is part of a run's identity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmref.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """Metadata of a field.

    Args:
        at_least, above: the lower bound, itself allowed or not.
        below: the upper bound, not itself allowed.
        words: what may stand in the place of a number.
        length: how many values a list has.
        share: a number from 0 to 1.
        unit: what is counted.
        identity: whether another value makes another run; False for scale, logging and what only says when a run ends.
        added: came after results were published: at its default a run's hash is what it was without the field.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None
    words: tuple[str, ...] = ()
    share: bool = False
    unit: str = ""
    identity: bool = True
    added: bool = False

    def __str__(self) -> str:
        """The bounds and the unit in words, "" without any."""
        bound = "from 0 to 1" if self.share else ""
        if self.at_least is not None:
            bound = f"at least {self.at_least:g}"
        if self.above is not None:
            bound = f"above {self.above:g}"
        if self.below is not None:
            bound = f"below {self.below}"
        if self.length is not None:
            bound = f"{self.length} numbers, each {bound}" if bound else f"{self.length} numbers"
        return " ".join(part for part in (bound, self.unit) if part)

    def check(self, name: str, given: Any) -> None:
        """Raise ConfigError for a value, or one of a list, out of bounds, infinity and NaN among them."""
        if isinstance(given, str) and given in self.words:
            return
        if self.length is not None and len(given) != self.length:
            raise ConfigError(f"`{name}` is {self.length} numbers, found {given}.")
        for value in given if isinstance(given, list) else [given]:
            self._check_one(name, value, f"{value} in {given}" if value is not given else str(value))

    def _check_one(self, name: str, value: Any, found: str) -> None:
        if value in self.words:
            return
        if self.share and not 0 <= value <= 1:
            raise ConfigError(f"`{name}` is a share between 0 and 1, found {found}.")
        if self.at_least is not None and not value >= self.at_least:
            raise ConfigError(f"`{name}` must be at least {self.at_least:g}, found {found}.")
        if self.above is not None and not value > self.above:
            raise ConfigError(f"`{name}` must be above {self.above:g}, found {found}.")
        if self.below is not None and not value < self.below:
            raise ConfigError(f"`{name}` must be below {self.below}, found {found}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"`{name}` must be finite, found {found}.")


PLAIN = Option()


def option(default: Any, **about: Any) -> Any:
    """A dataclass field with an `Option`; each config gets a list of its own."""
    metadata = {"option": Option(**about)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options(section: Any, prefix: str = "") -> Iterator[tuple[str, Option, Any]]:
    """(dotted name, option, value) of every field of a config, sections before what they hold."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        yield prefix + f.name, f.metadata.get("option", PLAIN), value
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{f.name}.")

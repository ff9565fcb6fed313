"""A search space: YAML over config fields, typed and checked against the config tree before anything starts."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import math
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import yaml

from mmref.config import Config, EvalConfig, check_config, from_dict, placed, to_dict, unknown_key
from mmref.config.cast import UNIONS, cast_value
from mmref.config.inputs import settled
from mmref.config.shipped import file_or_name
from mmref.errors import ConfigError
from mmref.storage.locations import absolute, expanded
from mmref.storage.texts import parse_yaml, read_text

KEYS = {
    "choice": {"values"},
    "uniform": {"low", "high"},
    "loguniform": {"low", "high"},
    "int": {"low", "high"},
}
REFINEMENT = {  # name in a space -> the field that holds the values to try
    "refinement.kind": "eval.refine_kinds",
    "refinement.weight": "eval.refine_weights",
    "refinement.top_r": "eval.refine_top_rs",
    "refinement.tau": "eval.refine_taus",
}
FIXED = {
    "run_dir": "every trial has its own",
    "data.root": "trials are compared on its val split",
    "train.seed": "the final comparison takes seeds that no trial used",
    "train.max_steps": "trials are compared step by step; `--trial-steps` sets their length",
    "train.epochs": "trials are compared step by step; `--trial-steps` sets their length",
    "train.eval_every": "trials are compared at their evaluations",
    "train.workers": "trials are sized before the sweep starts",
    "train.min_workers": "trials are sized before the sweep starts",
    "train.gpu": "trials are sized before the sweep starts",
    "train.cpus_per_worker": "trials are sized before the sweep starts",
    "train.threads": "trials are sized before the sweep starts",
    "train.storage_gb": "trials are sized before the sweep starts",
    "train.keep_checkpoints": "a trial keeps its best",
    "data.readers": "trials are sized before the sweep starts",
}
COMPARED_BY = "it is how trials are compared, all of them alike"
LISTED = 10_000  # values of a range that a grid may have
DRAWS = 256  # of a space, to see that its fields go together


@dataclass(frozen=True)
class Parameter:
    """One searched field."""

    name: str
    kind: Literal["choice", "uniform", "loguniform", "int"]
    values: tuple[Any, ...] = ()  # of a choice
    low: float = 0
    high: float = 0  # included by `int`

    def at(self, share: float) -> Any:
        """The value at a share of the range in [0, 1): uniform shares give what random search draws."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        if self.kind == "int":
            return int(self.low) + int(share * (self.high + 1 - self.low))
        if self.kind == "loguniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def listed(self) -> tuple[Any, ...] | None:
        """Every value, where they can be counted."""
        if self.kind == "choice":
            return self.values
        if self.kind != "int" or self.high - self.low >= LISTED:
            return None
        return tuple(range(int(self.low), int(self.high) + 1))

    def contains(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.values
        if not isinstance(value, int | float) or (self.kind == "int" and not float(value).is_integer()):
            return False
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Space:
    """Fields that trials differ in, and the refinement's grid, which every trial searches as a whole."""

    parameters: tuple[Parameter, ...]
    refinement: dict[str, list[Any]] = field(default_factory=dict)  # config field -> values
    text: str = ""  # the file

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values. Raises ConfigError where a field is a range."""
        lists = {p.name: p.listed() for p in self.parameters}
        if ranges := [name for name, values in lists.items() if values is None]:
            raise ConfigError(
                f"`--searcher grid` needs fields of type choice, or int of at most {LISTED:,} values; {', '.join(ranges)} are "
                "ranges. List the values to try, or search with optuna or random."
            )
        return [dict(zip(lists, values)) for values in itertools.product(*(v for v in lists.values() if v is not None))]

    def with_absolute_paths(self) -> Space:
        """A copy whose paths mean the same in another directory, as trials run in. Raises PathError."""

        def means(name: str, value: Any) -> Any:
            return placed(name, value, lambda place: absolute(expanded(place))) if isinstance(value, str) else value

        parameters = [replace(p, values=tuple(means(p.name, v) for v in p.values)) for p in self.parameters]
        if parameters == list(self.parameters):
            return self
        entries = parse_yaml(self.text, "the space", ConfigError)
        for before, after in zip(self.parameters, parameters):
            if before != after:
                entries[before.name]["values"] = list(after.values)
        return replace(self, parameters=tuple(parameters), text=yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))

    def prepare(self, base: Config) -> Config:
        """The base config with this space's refinement grid beside its own, searched in training. Raises ConfigError where some
        value of the space does not go with it, or with others of the space."""
        grids = {name: _union(get_value(base, name), values) for name, values in self.refinement.items()}
        prepared = with_values(base, {**grids, "eval.refine_in_training": True})
        for p in self.parameters:
            listed = p.listed()
            for value in listed if listed and len(listed) <= DRAWS else (p.low, p.high):
                _check(prepared, {p.name: value})
        rng = np.random.default_rng(0)
        for shares in rng.random((DRAWS, len(self.parameters))).tolist():
            _check(prepared, {p.name: p.at(share) for p, share in zip(self.parameters, shares)})
        return prepared

    def outside(self, base: Config) -> list[str]:
        """The fields whose value in the config the space leaves out, as `loss.w_rec 0.3`."""
        own = self.own_values(base)
        return [f"{p.name} {own[p.name]}" for p in self.parameters if not p.contains(own[p.name])]

    def default_point(self, base: Config) -> dict[str, Any] | None:
        """The config's own values, None where the space leaves one of them out."""
        return None if self.outside(base) else self.own_values(base)

    def own_values(self, base: Config) -> dict[str, Any]:
        """The config's values of the searched fields, `auto` as the number that it stands for."""
        config = settled(base)
        return {p.name: get_value(config, p.name) for p in self.parameters}


def _union(own: list[Any], more: list[Any]) -> list[Any]:
    """The config's values and the space's, numbers in order."""
    values = list(dict.fromkeys([*own, *more]))
    return values if any(isinstance(v, str) for v in values) else sorted(values)


def _check(config: Config, values: dict[str, Any]) -> None:
    """Raise ConfigError where a config does not take these values together."""
    try:
        with_values(config, values)
    except ConfigError as error:
        named = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise ConfigError(f"search space: {named} does not fit the config: {error}") from None


def read_space(path: str) -> Space:
    """A space from a YAML file, or by the name of one that comes with mmref.

    Raises ConfigError that names the file, the field, and what would be right.
    """
    path = file_or_name(path, "tune/spaces")
    return parse_space(read_text(path, ConfigError), path)


def parse_space(text: str, path: str) -> Space:
    """As `read_space`, from the text of the file."""
    entries = parse_yaml(text, path, ConfigError)
    if not entries:
        raise ConfigError(f"{path} is empty: it needs at least one field to search, for example "
                          "`loss.w_guide: {type: uniform, low: 0.0, high: 1.0}`.")  # fmt: skip
    parameters, refinement = [], {}
    for name, entry in entries.items():
        if name.startswith("refinement."):
            refinement.update(_refinement(str(name), entry, path))
        else:
            parameters.append(_parameter(str(name), entry, path))
    if not parameters:
        raise ConfigError(f"{path} searches refinement alone, which takes no sweep: `mmref evaluate` chooses it on val.")
    return Space(tuple(parameters), refinement, text)


def _parameter(name: str, entry: Any, path: str) -> Parameter:
    hint = field_type(name, path)
    if why := FIXED.get(name, COMPARED_BY if name.startswith("eval.") else ""):
        raise ConfigError(f"{path}: `{name}` cannot be searched: {why}.")
    kind = _kind(name, entry, path)
    if kind == "choice":
        return Parameter(name, kind, _values(name, entry["values"], hint, path))
    wanted = int if kind == "int" else float
    if wanted is float and hint is int:
        raise ConfigError(f"{path}: `{name}` is a whole number: use type `int` or `choice`, not `{kind}`.")
    if hint not in (int, float):
        raise ConfigError(f"{path}: `{name}` is no number: use type `choice`, not `{kind}`.")
    low, high = (cast_value(name, entry[end], wanted, path) for end in ("low", "high"))
    if not low < high:
        raise ConfigError(f"{path}: `{name}` has low {low} and high {high}; low must be below high.")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{path}: `{name}` is loguniform and needs low above 0, found {low}.")
    return Parameter(name, kind, low=low, high=high)


def _refinement(name: str, entry: Any, path: str) -> dict[str, list[Any]]:
    if name not in REFINEMENT:
        near = difflib.get_close_matches(name, REFINEMENT, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else f" There are {', '.join(REFINEMENT)}."
        raise ConfigError(f"{path}: unknown refinement setting `{name}`.{hint}")
    kind = _kind(name, entry, path)
    if kind != "choice":
        raise ConfigError(f"{path}: `{name}` is searched exactly, over {{type: choice, values: [...]}}; found {kind}.")
    target = REFINEMENT[name]
    (item,) = typing.get_args(typing.get_type_hints(EvalConfig)[target.removeprefix("eval.")])
    return {target: list(_values(name, entry["values"], item, path))}


def _kind(name: str, entry: Any, path: str) -> Any:
    """The type of an entry, its keys checked."""
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise ConfigError(f"{path}: `{name}` needs {{type: {'|'.join(KEYS)}, ...}}, found {entry!r}.")
    keys = set(entry) - {"type"}
    if keys != KEYS[kind]:
        raise ConfigError(f"{path}: `{name}` of type {kind} takes {' and '.join(sorted(KEYS[kind]))}, found "
                          f"{', '.join(sorted(map(str, keys))) or 'nothing'}.")  # fmt: skip
    return kind


def _values(name: str, values: Any, hint: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}: `{name}` needs a list of values, found {values!r}.")
    return tuple(cast_value(name, value, hint, path) for value in values)


def annotation(name: str, where: str) -> Any:
    """Type of a dotted field as it is annotated. Raises ConfigError for an unknown one."""
    cls: Any = Config
    for part in name.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in hints:
            raise unknown_key(name, where)
        cls = hints[part]
    others = [kind for kind in typing.get_args(cls) if kind != Literal["auto"]]
    return others[0] if typing.get_origin(cls) is typing.Union and len(others) == 1 else cls  # searched are its numbers


def is_single(hint: Any) -> bool:
    """Whether a field of this annotation holds one value: no section, list or mapping."""
    if typing.get_origin(hint) in UNIONS:  # a number, or a word in its place
        return all(is_single(part) for part in typing.get_args(hint))
    return not (dataclasses.is_dataclass(hint) or typing.get_origin(hint) in (list, dict))


def field_type(name: str, where: str) -> Any:
    """Type of a field that holds one value. Raises ConfigError: an unknown field, a section, a list."""
    hint = annotation(name, where)
    if not is_single(hint):
        raise ConfigError(f"{where}: `{name}` is not a single value and cannot be searched.")
    return hint


def get_value(config: Config, name: str) -> Any:
    """Value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A checked copy of a config with dotted fields set. Raises ConfigError."""
    tree = copy.deepcopy(to_dict(config))
    for name, value in values.items():
        *sections, last = name.split(".")
        at = tree
        for section in sections:
            at = at[section]
        at[last] = value
    return check_config(from_dict(tree))

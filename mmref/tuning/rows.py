"""What an ablation compares: rows over one config, from a YAML file, checked before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from mmref.config import Config, read_yaml
from mmref.config.cast import cast_value
from mmref.config.shipped import file_or_name
from mmref.errors import ConfigError
from mmref.run.models import start_of_training
from mmref.tuning.space import annotation, with_values

TOP = {"baseline", "rows", "over"}
SIZES = ("train.workers", "train.gpu", "train.cpus_per_worker", "data.readers")  # what a training takes of the cluster
KEYS = {"set", "steps", "of", "refined", "against"}


@dataclass(frozen=True)
class Row:
    """A line of the table: a training, or the refined results of one."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)  # dotted config fields of its training
    steps: float = 1.0  # multiple of the length of training; 0: none, the starting weights are evaluated
    of: str = ""  # the row whose training it reads, where that is not its own
    refined: bool = False  # results after refinement
    against: str = ""  # the row it is compared with besides the baseline

    @property
    def training(self) -> str:
        """Name of the row that is trained for this one."""
        return self.of or self.name


@dataclass(frozen=True)
class Rows:
    """Rows, the one that all are compared with, and a field whose values each row is trained at."""

    rows: tuple[Row, ...]
    baseline: str
    over: str = ""  # dotted config field, "" for none
    points: tuple[Any, ...] = (None,)  # its values

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def only(self, names: list[str], where: str) -> Rows:
        """These rows, those they read and the baseline, in the file's order. Raises ConfigError for a name that is no row."""
        for name in names:
            _check_name(name, self.rows, where)
        wanted = {*names, self.baseline}
        wanted |= {row.of for row in self.rows if row.name in wanted}
        return replace(self, rows=tuple(row for row in self.rows if row.name in wanted))

    def compared_with(self, name: str, where: str) -> Rows:
        """The same rows with another baseline. Raises ConfigError for a name that is no row."""
        _check_name(name, self.rows, where)
        return replace(self, baseline=name)

    def config(self, base: Config, name: str, point: Any, seed: int, run_dir: str) -> Config:
        """The config of a row's training at one value of `over` and one seed. Raises ConfigError."""
        row = self[self[name].training]
        values = {**row.values, "train.seed": seed, "run_dir": run_dir}
        if self.over:
            values[self.over] = point
        if row.steps:
            values["train.max_steps"] = round(base.train.max_steps * row.steps)
        return with_values(base, values)


@dataclass(frozen=True)
class Training:
    """One training of an ablation."""

    row: str
    point: Any
    seed: int

    @property
    def folder(self) -> str:
        """Its run directory below the ablation's: `full-seed0`, `full-0.2-seed0`."""
        parts = [self.row, *([] if self.point is None else [str(self.point)]), f"seed{self.seed}"]
        return "-".join(_in_name(part) for part in parts)

    def __str__(self) -> str:
        return f"{self.row}{'' if self.point is None else f' at {self.point}'}, seed {self.seed}"


def _in_name(part: str) -> str:
    """A part of a folder's name; a minus before a number is what tells it from another."""
    minus = "minus" if re.fullmatch(r"-[\d.].*", part) else ""
    return minus + re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-")


def seed_of(folder: str) -> int | None:
    """The seed in the name of a training's run directory; None of any other name."""
    found = re.search(r"-seed(\d+)$", folder)
    return int(found[1]) if found else None


def trainings(rows: Rows, seeds: list[int]) -> list[Training]:
    """Every training the rows need, each once: seed by seed, so that an interrupted ablation has whole pairs."""
    names = dict.fromkeys(row.training for row in rows.rows)
    return [Training(name, point, seed) for seed in seeds for point in rows.points for name in names]


def read_rows(path: str, base: Config) -> Rows:
    """Rows from a YAML file, or by the name of one that comes with mmref, their configs checked over `base`.

    Raises ConfigError with the file, the row and the fix.
    """
    path = file_or_name(path, "tune/rows")
    found = read_yaml(path)
    if unknown := set(found) - TOP:
        raise ConfigError(f"{path}: unknown key `{sorted(unknown)[0]}`; it takes {', '.join(sorted(TOP))}.")
    entries = found.get("rows")
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path} needs `rows`, a mapping of names to rows; see tune/rows/default.yaml.")
    rows = tuple(_read_row(str(name), entry or {}, path) for name, entry in entries.items())
    for row in rows:
        for other in filter(None, (row.of, row.against)):
            _check_name(other, rows, f"{path}: row `{row.name}`")
        if row.of and (row.values or row.steps != 1.0):
            raise ConfigError(f"{path}: row `{row.name}` reads the training of `{row.of}` and cannot `set` or lengthen it.")
        if row.of and next(r for r in rows if r.name == row.of).of:
            raise ConfigError(f"{path}: row `{row.name}` is of `{row.of}`, which has no training of its own.")
    baseline = str(found.get("baseline", rows[0].name))
    _check_name(baseline, rows, f"{path}: baseline")
    over, points = _read_over(found.get("over"), path)
    for row in rows:
        if over in row.values:
            raise ConfigError(f"{path}: row `{row.name}` sets `{over}`, which `over` sets for every row: leave one of them out.")
    result = Rows(rows, baseline, over, points)
    folders: dict[str, Training] = {}
    for training in trainings(result, [0]):
        try:
            config = result.config(base, training.row, training.point, 0, base.run_dir)
            if not result[training.row].steps and not start_of_training(config):
                raise ConfigError(
                    "`steps: 0` evaluates the weights that training would start from, and these are random. Set "
                    "`train.start_from` or `model.dual` to a model."
                )
        except ConfigError as error:
            raise ConfigError(f"{path}: row `{training.row}`: {error}") from None
        if folders.setdefault(training.folder, training) != training:
            raise ConfigError(f"{path}: `{training}` and `{folders[training.folder]}` would share a folder: rename one row.")
    return result


def _read_row(name: str, entry: Any, path: str) -> Row:
    if not isinstance(entry, dict) or set(entry) - KEYS:
        raise ConfigError(f"{path}: row `{name}` takes {', '.join(sorted(KEYS))}; found {entry!r}.")
    values, steps, refined = entry.get("set") or {}, entry.get("steps", 1.0), entry.get("refined", False)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: row `{name}`: `set` takes fields with values, as {{loss.w_guide: 0.0}}; found {values!r}.")
    if not isinstance(refined, bool):
        raise ConfigError(f"{path}: row `{name}`: `refined` is true or false, found {refined!r}.")
    if not isinstance(steps, int | float) or not 0 <= steps < math.inf:
        raise ConfigError(
            f"{path}: row `{name}`: `steps` multiplies the length of training (0: the starting weights alone), found {steps!r}."
        )
    values = {key: _value(key, value, path) for key, value in values.items()}
    text = [str(entry.get(key, "")) for key in ("of", "against")]
    return Row(name, values, float(steps), text[0], refined, text[1])


def _read_over(entry: Any, path: str) -> tuple[str, tuple[Any, ...]]:
    if entry is None:
        return "", (None,)
    if not isinstance(entry, dict) or len(entry) != 1 or not all(isinstance(v, list) and v for v in entry.values()):
        raise ConfigError(f"{path}: `over` takes one field and its values, as {{data.caption_noise: [0.0, 0.2, 0.5]}}.")
    ((name, values),) = entry.items()
    if not isinstance(name, str):
        raise ConfigError(f"{path}: `over` takes a config field and its values, found {name!r}.")
    if any(isinstance(value, dict | list) for value in values):
        raise ConfigError(f"{path}: `over` takes single values of `{name}`, a point of the curve each; make rows of the others.")
    points = tuple(_value(name, value, path) for value in values)
    if twice := [value for i, value in enumerate(points) if value in points[:i]]:
        raise ConfigError(f"{path}: `over` has {twice[0]!r} twice among the values of `{name}`.")
    return name, points


def _value(name: str, value: Any, path: str) -> Any:
    """A value as its field's type. Raises ConfigError; also for a field that the ablation itself sets."""
    if name in ("run_dir", "train.seed", "train.max_steps", "train.epochs"):
        raise ConfigError(f"{path}: `{name}` is set by the ablation; `steps` changes the length of one row's training.")
    if name in SIZES:
        raise ConfigError(f"{path}: `{name}` sizes the trainings before they start: set it for all, on the command line.")
    hint = annotation(name, path)
    if dataclasses.is_dataclass(hint):
        raise ConfigError(f"{path}: `{name}` is a section: set its fields, as `{name}.{dataclasses.fields(hint)[0].name}`.")
    return cast_value(name, value, hint, path)


def _check_name(name: str, rows: tuple[Row, ...], where: str) -> None:
    names = [row.name for row in rows]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else f"Rows: {', '.join(names)}."
        raise ConfigError(f"{where}: there is no row `{name}`. {hint}")

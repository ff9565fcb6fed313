"""Configs from flags and YAML files, as plain values, their paths, and their identity."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from mmref.config.cast import cast_value
from mmref.config.checks import check_config
from mmref.config.inputs import BEFORE, neutral, settled
from mmref.config.option import options
from mmref.config.presets import PRESETS, preset_file, with_files
from mmref.config.shipped import file_or_name
from mmref.config.tree import Config, DataConfig
from mmref.errors import ConfigError
from mmref.storage.locations import absolute, expanded, folder_name, in_utf8
from mmref.storage.texts import ODD_NUMBER, parse_yaml, read_text
from mmref.terminal.parser import respelled

SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if f.name != "run_dir")
"""Of the tree of fields, in its order."""
PLACES = ("run_dir", "data.root", "data.neighbors")
"""Fields that hold a path or URL."""
PLACES_ON_NODES = ("data.cache_dir", "model.feature_cache")
"""Fields that hold a path of each node: `~` is the home directory there."""
NAMES_OR_PLACES = ("data.tokenizer", "model.dual", "model.vision", "model.text", "train.start_from")
"""Fields that hold a path, URL, hub id or `package://` name."""


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of every field: ["run_dir", "data.root", ...]."""
    keys = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            keys += known_keys(type(default), f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def _check_keys(given: dict[str, Any], cls: type, where: str, prefix: str = "") -> None:
    """Raise ConfigError for the first key of a nested dict that is no field, naming the nearest one, or that has no value."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in fields:
            raise unknown_key(prefix + str(key), where)
        factory: Any = fields[key].default_factory
        default = factory() if factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: `{prefix}{key}` is a section and takes keys below it, found {value!r}.")
            _check_keys(value, type(default), where, f"{prefix}{key}.")
        elif value is None and fields[key].default is not None:
            raise ConfigError(
                f"{where}: `{prefix}{key}` has no value: give one, or leave the line out. To YAML `~` alone is none, nor is "
                "`null`; in quotation marks they are texts."
            )


def unknown_key(key: str, where: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lower(), b).ratio()

    def closeness(known: str) -> tuple[float, bool, float]:
        """By the whole name or, where the section is wrong or missing, by the last part; most keys are of `train`."""
        whole, last = alike(key, known), alike(key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1])
        return max(whole, last), known.startswith("train."), whole

    near = max([*known_keys(), *SECTIONS], key=closeness)
    hint = f" Did you mean `{near}`?" if closeness(near)[0] >= 0.7 else " `mmref train --help` lists all keys."
    section, dot, name = key.partition(".")
    if key in SECTIONS:  # as a flag
        hint = f" It is a section: name a field of it, `--{key}.FIELD VALUE`."
    elif key == near and dot:  # as flags are written
        hint = f" A file has it in its section: `{section}:` and, indented below, `{name}: ...`."
    return ConfigError(f"{where}: unknown config key `{key}`.{hint}")


def build_parser(section: str = "") -> Any:
    """The jsonargparse parser of a run: `--config FILE` and a flag for every field; of one section alone for its help."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="mmref train",
        exit_on_error=False,
        usage="mmref train [--preset NAME | --config FILE] [--run_dir DIR] [--SECTION.FIELD VALUE ...]",
        description="Train MMRef, evaluate it on val and test, write a report. `--log-level` as of every command.",
        epilog=f"`mmref train --help SECTION` tells of one section alone: {', '.join(SECTIONS)}. `mmref train --from-judgements "
        "INDEX` fine-tunes on judgements of results, and has a help of its own.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action=jsonargparse.ActionConfigFile,
        help="YAML file, or the name of one that comes with mmref (emoji, smoke, ...); flags after it win.",
    )
    presets = "; ".join(f"{name}: {what}" for name, what in PRESETS.items())
    told = f"Config to begin with, in place of a file; flags after it win. {presets}."
    parser.add_argument("--preset", metavar="NAME", action=_Preset, help=told)
    parser.add_class_arguments(Config, nested_key=None)
    said = {name: str(option) for name, option, _ in options(Config())}
    for action in parser._actions:
        if action.dest in SECTIONS:
            action.help = argparse.SUPPRESS  # a file for one section alone: `--config` does
        elif bounds := said.get(action.dest):
            action.help = f"{action.help} [{bounds}]"
        if "." in action.dest and action.choices is None:
            action.metavar = action.metavar or "VALUE"
    for group in parser._action_groups:
        dests = {action.dest.partition(".")[0] for action in group._group_actions}
        if (of := dests & set(SECTIONS)) and len(dests) == 1:
            group.title = f"{of.pop()}: {str(group.title).rstrip('.:')}"
    if section:
        parser._action_groups = [group for group in parser._action_groups if str(group.title).startswith(f"{section}: ")]
    return parser


class _Preset(argparse.Action):
    """Only told of in the help: `with_files` has put a file in its place before anything is parsed."""

    def __init__(self, option_strings: Sequence[str], dest: str, **about: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **about)

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ConfigError("`--preset` stands on the command line alone.")


def load_config(argv: list[str]) -> Config:
    """Config from flags (and the YAML files they name). Raises ConfigError; `--help` prints and exits."""
    for word, following in itertools.pairwise(argv):
        if word in ("-h", "--help") and following in SECTIONS:
            print(build_parser(following).format_help())
            raise SystemExit(0)
    argv = _with_values(with_files(respelled(argv, [f"--{key}" for key in (*known_keys(), "config", "preset", "print_config")])))
    defaults = {name: value for name, _, value in options(Config())}
    for word, following in zip(argv, [*argv[1:], ""]):
        name, given, value = word[2:].partition("=")
        name = name.removesuffix("+")
        if word.startswith("--") and name not in {"config", "help", "print_config"} and not _is_key(name):
            raise unknown_key(name, "command line")
        text = value if given else following
        if (name == "data.mix" or "_config" in name) and text.startswith("{"):
            parse_yaml(text, f"--{name}", ConfigError)  # a key that is given twice is one too many here as well
        elif isinstance(defaults.get(name), int | float):
            _check_number(name, text)
    return _parsed(argv)


def make_config(given: Config | Mapping[str, Any] | str | os.PathLike[str], fields: Mapping[str, Any] | None = None) -> Config:
    """A checked config of what a program holds, read as the command line would read it.

    Args:
        given: the name of a preset or of a config that comes with mmref, a YAML file, sections with their fields, or a config.
        fields: values that win over it, by dotted name: {"train.lr": 1e-5}.

    Raises:
        ConfigError: an unknown field, or a value that it does not take.
    """
    if isinstance(given, Config):
        values = to_dict(given)
    elif isinstance(given, Mapping):
        values = copy.deepcopy(dict(given))
    else:
        name = os.fspath(given)
        values = _file_values(preset_file(name) if name in PRESETS else file_or_name(name, "configs"))
    for name, value in (fields or {}).items():
        if name in SECTIONS:
            raise ConfigError(f"fields: `{name}` is a section: name its fields, as in {{'{name}.FIELD': ...}}.")
        if not _is_key(str(name)):
            raise unknown_key(str(name), "fields")
        *sections, last = name.split(".")
        at = values
        for section in sections:
            at[section] = at = dict(at.get(section) or {})
        at[last] = value
    _check_keys(values, Config, "config")
    try:
        text = yaml.dump(values, Dumper=_Plain, sort_keys=False)
    except yaml.representer.RepresenterError as error:
        value = error.args[-1]
        raise ConfigError(
            f"config: {value!r} is a {type(value).__name__}, and fields hold plain values: of a NumPy number give `.item()`."
        ) from None
    return _parsed([f"--config={text}"])


def _parsed(argv: list[str]) -> Config:
    """Config of flags whose files have been read. Raises ConfigError."""
    import jsonargparse

    parser = build_parser()
    try:
        parsed = parser.parse_args(argv)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"config: {error}") from None
    config = parser.instantiate_classes(parsed)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    return check_config(with_places(Config(**values), lambda place: in_utf8(expanded(place))))


def _check_number(name: str, text: str) -> None:
    """Raise ConfigError for a number of the command line that jsonargparse, which reads YAML, takes for another: 010 for 8."""
    if ODD_NUMBER.match(text):
        parse_yaml(f"{name}: {text}", f"--{name}", ConfigError)


def _is_key(name: str) -> bool:
    keys = known_keys()
    return name in keys or any(name.startswith(k + ".") for k in keys if k.endswith("_config"))


class _Plain(yaml.SafeDumper):
    """YAML in ASCII with every text in quotation marks, so that none is read as a number."""


_Plain.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Plain.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_data(os.fspath(path)))


def _with_values(argv: list[str]) -> list[str]:
    """The command line with the values of its config files, their keys checked, in place of the names. Raises ConfigError.

    jsonargparse takes either, and would read a file in the encoding of the terminal.
    """
    flag, words = "--config=", []
    rest = iter(argv)
    for word in rest:
        path = next(rest, None) if word == "--config" else word.removeprefix(flag) if word.startswith(flag) else None
        if path is None:
            words.append(word)
            continue
        words.append(flag + yaml.dump(_file_values(file_or_name(path, "configs")), Dumper=_Plain, sort_keys=False))
    return words


def _file_values(path: str) -> dict[str, Any]:
    """Keys and values of a config file, with numbers as jsonargparse reads them. Raises ConfigError."""
    import jsonargparse

    text = read_text(path, ConfigError)
    if not (values := parse_yaml(text, path, ConfigError)):
        raise ConfigError(f"{path} is empty: leave it out to train with the defaults.")
    _check_keys(values, Config, path)
    return dict(jsonargparse.get_loader("yaml")(text))


def read_yaml(path: str) -> dict[str, Any]:
    """Keys and values of a YAML file. Raises ConfigError that names the file, and the line where there is one."""
    return parse_yaml(read_text(path, ConfigError), path, ConfigError)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a config."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str = "config") -> Config:
    """Config from a nested dict, unknown keys refused. Raises ConfigError."""
    _check_keys(values, Config, where)
    return check_config(_config_of(values))


def from_saved(values: dict[str, Any], where: str) -> Config:
    """As `from_dict`, of a config that a run or an export has kept: what versions before had no field for is as it was then.

    Anybody may have written it or edited it since: its values are held against the types of their fields too.
    """
    if isinstance(data := values.get("data"), dict):
        values = {**values, "data": {**BEFORE, **data}}
    _check_keys(values, Config, where)
    config = _config_of(_typed(values, Config, where))
    try:
        return check_config(config)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from None


def _config_of(values: dict[str, Any]) -> Config:
    """Config from a nested dict whose keys have been checked."""
    config = Config()
    for key, value in values.items():
        section = getattr(config, key)
        if dataclasses.is_dataclass(section):
            setattr(config, key, dataclasses.replace(section, **value))  # type: ignore[type-var]
        else:
            setattr(config, key, value)
    return config


def _typed(values: dict[str, Any], cls: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict as their fields' types; an equal one stays as it is, since 1 and 1.0 make two hashes. Raises
    ConfigError."""
    hints, typed = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hint := hints[key]):
            typed[key] = _typed(value, hint, where, f"{prefix}{key}.")
        else:
            cast = cast_value(prefix + key, value, hint, where)
            typed[key] = value if cast == value else cast
    return typed


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML, in field order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Config) -> str:
    """12 hex digits of everything that changes results: not the run directory, scale or logging."""
    if not config.model.dual:  # what `auto` stands for takes no look at a model
        config = settled(config)
    values = to_dict(config)
    values["data"]["root"] = folder_name(config.data.root)  # a set may be moved
    values["data"]["mix"] = [[folder_name(root), share] for root, share in config.data.mix.items()] or {}  # its order counts
    values["data"]["neighbors"] = folder_name(config.data.neighbors)  # the fingerprint of a run's data is of its content
    for name in neutral(config.data):
        values["data"].pop(name)
    for name in NAMES_OR_PLACES:  # runs of older versions hold a folder's path as it was given
        section, key = name.split(".")
        values[section][key] = _name_or_place(values[section][key], absolute)
    defaults = {name: value for name, _, value in options(Config())}
    for name, option, value in options(config):
        if not option.identity or (option.added and value == defaults[name]):
            *sections, last = name.split(".")
            (values[sections[0]] if sections else values).pop(last)
    values["data"]["max_bad_fraction"] = DataConfig.max_bad_fraction  # as the hashes of published results have it
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def with_absolute_paths(config: Config) -> Config:
    """A copy that means the same in another directory, as Ray's workers run in."""
    return with_places(config, lambda place: absolute(expanded(place)))


def with_places(config: Config, to: Callable[[str], str]) -> Config:
    """A checked copy in which every path has passed through `to`; hub ids and names of packages are left alone.

    Raises ConfigError where two shard sets of `data.mix` are one and the same, or one has no text for its name.
    """
    values = to_dict(config)
    mix = values["data"]["mix"]
    if odd := [root for root in mix if not isinstance(root, str)]:
        raise ConfigError(f"`data.mix` names the shard set {odd[0]!r}, which YAML reads as a {type(odd[0]).__name__}: quote it.")
    values["data"]["mix"] = {to(root): share for root, share in mix.items()}
    if len(values["data"]["mix"]) < len(mix):
        raise ConfigError(f"`data.mix` names a shard set twice: {', '.join(mix)}.")
    for name in (*PLACES, *PLACES_ON_NODES, *NAMES_OR_PLACES):
        *section, key = name.split(".")
        at = values[section[0]] if section else values
        at[key] = placed(name, at[key], to)
    return from_dict(values)


def placed(name: str, value: str, to: Callable[[str], str]) -> str:
    """The value of a field through `to`, where it is a path that means the same on every node; any other as it is."""
    if not value and name not in ("run_dir", "data.root"):
        return value
    if name in PLACES:
        return to(value)
    if name in PLACES_ON_NODES:
        return value if to(value) and value.startswith("~") else to(value)
    return _name_or_place(value, to) if name in NAMES_OR_PLACES else value


def _name_or_place(value: str, to: Callable[[str], str]) -> str:
    """A path through `to`; a hub id as it is. Which of the two it is, transformers decides in the same way."""
    return to(value) if value.startswith(("/", "~", ".")) or os.path.isdir(value) else value

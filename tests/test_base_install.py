"""What a base install can do: everything but training, tuning and serving, without Ray, DeepSpeed or TensorBoard."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmref.errors import ExtraMissingError
from mmref.extras import EXTRAS, missing, need

ROOT = Path(__file__).parents[1]
ABSENT = (
    "ray", "deepspeed", "tensorboard", "tensorboardX", "ninja", "webdataset", "optuna", "rich", "fastapi", "starlette", "uvicorn",
    "prometheus_client", "peft", "resvg_py", "datasets",
)  # fmt: skip
# Modules that cannot be imported without an extra, which no other command comes by.
APART = {
    "train": {"mmref.data.stream", "mmref.train.loop", "mmref.train.ray_trainer", "mmref.train.trainer"},
    "tune": {
        f"mmref.tuning.{name}"
        for name in ("ablate", "asha", "final", "recorder", "search", "sweep", "sweep_figures", "sweep_report", "trial_run")
    },
    "serve": {f"mmref.retrieval.service.{name}" for name in ("app", "counters", "guard", "patience", "server", "transfers")},
}
# Each command's help, then each module, in a process that has none of these packages.
ALONE = """
import contextlib, importlib, io, json, pkgutil, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
import mmref
from mmref.cli import COMMANDS, main

found = {"help": {}, "asked": {}, "failed": {}}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        found["help"][name] = main([name, "--help"])
    found["help"][name] = out.getvalue()[:20]
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(words)
    found["asked"][" ".join(words)] = [status, said.getvalue()]
for module in pkgutil.walk_packages(mmref.__path__, "mmref."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        found["failed"][module.name] = str(error.name)
print(json.dumps(found))
"""
ASKED = {
    "train --config smoke": "train", "tune --trials 1": "tune", "ablate --config smoke": "train", "serve nowhere": "serve",
    "shards build dataset nobody/nothing --out {out}": "hub",
    "index nowhere --model nowhere --out {out} --workers 2": "train",
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    asked = [[word.format(out=folder / "index") for word in words.split()] for words in ASKED]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(ABSENT), json.dumps(asked)],
        cwd=folder, text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_command_needs_an_extra_to_say_what_it_takes(alone: dict) -> None:
    assert len(alone["help"]) > 10
    for name, said in alone["help"].items():
        assert said.startswith(f"usage: mmref {name}"[:20]), (name, said)


def test_a_command_names_the_extra_that_it_needs(alone: dict) -> None:
    assert len(alone["asked"]) == len(ASKED)
    for (words, (status, said)), extra in zip(alone["asked"].items(), ASKED.values()):
        assert status == 1 and said.startswith("mmref: ExtraMissingError: "), (words, said)
        assert f"needs the extra `{extra}`" in said and f"pip install 'mmref[{extra}]'" in said


def test_only_what_belongs_to_an_extra_fails_without_it(alone: dict) -> None:
    apart = {module for modules in APART.values() for module in modules}
    assert set(alone["failed"]) == apart, alone["failed"]
    assert {name.partition(".")[0] for name in alone["failed"].values()} <= set(ABSENT)


def test_the_extras_are_those_of_the_package() -> None:
    assert set(EXTRAS) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_a_missing_extra_is_named_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert missing("tune") == ["optuna", "rich"] and missing("tune", "ray") == []
    with pytest.raises(ExtraMissingError) as found:
        need("tune", "mmref tune", otherwise="Or guess.")
    assert str(found.value) == (
        "mmref tune needs the extra `tune`, and optuna and rich are not installed here: pip install 'mmref[tune]'. Or guess."
    )
    need("tune", "mmref tune", "ray")


def test_a_folder_of_a_package_s_name_is_not_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As W&B leaves one where a run was started."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert missing("train", "no_such_package") == ["no_such_package"]
    (tmp_path / "no_such_package" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert missing("train", "no_such_package") == []

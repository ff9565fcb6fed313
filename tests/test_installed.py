"""The wheel outside a checkout: the journey from photographs to a search page, on the base install alone, then with `serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from support.images import write_images
from support.installed import brought, build_wheel, make_environment

from mmref.cli import COMMANDS
from mmref.extras import EXTRAS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # each command imports torch anew
Mmref = Callable[..., tuple[int, str, str]]
# The help of every command, in one process: most of its time goes into imports.
HELPS = """
import contextlib
from mmref.cli import COMMANDS, main
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that is no checkout."""
    return tmp_path_factory.mktemp("elsewhere")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")}


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of a base install."""
    folder = tmp_path_factory.mktemp("base")
    make_environment(folder, wheel)
    return folder


@pytest.fixture(scope="module")
def mmref(base: Path, elsewhere: Path) -> Mmref:
    """Runs the command of the base install; exit status, output, errors."""

    def run(*words: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [str(base / "bin" / "mmref"), *map(str, words)],
            cwd=elsewhere,
            env=environment(),
            text=True,
            capture_output=True,
            timeout=300,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_run import run_of

    return run_of(tiny_set, tmp_path_factory.mktemp("run") / "run")


def test_a_base_install_brings_nothing_that_trains_or_serves() -> None:
    base = {name.replace("-", "_") for name in brought(())}
    apart = {package for packages in EXTRAS.values() for package in packages}
    assert "torch" in base and not base & (apart - {"huggingface_hub", "rich"})  # which transformers brings


def test_every_command_says_what_it_takes(mmref: Mmref, base: Path, elsewhere: Path) -> None:
    status, said, _ = mmref("--help")
    assert status == 0 and all(name in said for name in COMMANDS)
    done = subprocess.run(
        [str(base / "bin" / "python"), "-c", HELPS], cwd=elsewhere, env=environment(), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: mmref {name}" in done.stdout


def test_photographs_are_indexed_searched_and_a_run_is_exported_and_evaluated(mmref: Mmref, run: Path, elsewhere: Path) -> None:
    write_images(elsewhere / "photos", range(11))
    for words in (("export", run, "--out", "export"), ("index", "photos", "--model", "export", "--out", "photo-index")):
        status, said, errors = mmref(*words)
        assert status == 0, errors
    assert "11 images" in said
    status, said, errors = mmref("search", "photo-index", "a red circle", "--top", 3, "--json")
    assert status == 0 and len(json.loads(said)["results"]) == 3, errors
    status, said, errors = mmref("evaluate", "--checkpoint", run, "--out", "metrics.json", "--no-report")
    assert status == 0 and "text to image" in said, errors
    assert json.loads((elsewhere / "metrics.json").read_text())["n_queries"] > 0
    status, _, errors = mmref("evaluate", "--checkpoint", run, "--workers", 2)
    assert status == 1 and "ExtraMissingError" in errors and "mmref[train]" in errors


def test_configs_come_with_the_wheel_and_their_data_does_not(mmref: Mmref) -> None:
    status, said, errors = mmref("sizing", "--config", "smoke", "--objects", 100)
    assert status == 0 and "parameters" in said, errors
    status, _, errors = mmref("sizing", "--config", "smook", "--objects", 100)
    assert status == 2 and "smook: there is no such file" in errors and "emoji, flowers" in errors
    status, _, errors = mmref("shards", "inspect", "data_shards/emoji")
    assert status == 1 and "mmref shards build emoji --out data_shards/emoji" in errors
    status, _, errors = mmref("train", "--config", "emoji")
    assert status == 1 and "pip install 'mmref[train]'" in errors


def test_an_index_is_served_without_ray(wheel: Path, mmref: Mmref, run: Path, elsewhere: Path, tmp_path: Path) -> None:
    write_images(elsewhere / "served", range(5))
    status, _, errors = mmref("index", "served", "--model", run, "--out", "served-index")
    assert status == 0, errors
    status, _, errors = mmref("serve", "served-index")
    assert status == 1 and "pip install 'mmref[serve]'" in errors
    command = make_environment(tmp_path / "serve", wheel, ["serve"])
    words = [str(command), "serve", "served-index", "--port", "0"]
    with subprocess.Popen(words, cwd=elsewhere, env=environment(), text=True, stdout=subprocess.PIPE) as service:
        try:
            line = service.stdout.readline()
            found = re.search(r"at (http://\S+/)", line)
            assert found, line
            with urllib.request.urlopen(f"{found[1]}search?text=red", timeout=60) as answer:
                assert len(json.load(answer)["results"]) == 5
        finally:
            service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0

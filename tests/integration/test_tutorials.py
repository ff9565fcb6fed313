"""The tutorials, as a user types them: their `bash` blocks in order, in one shell, on tiny data.

Only the values of the first block, `export NAME=value` lines that a reader changes too, are others. Blocks marked `sh` install
something, wait for a user, or concern other machines, and are not run.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw
from support.jobs import ROOT
from support.pretrained import save_pretrained

TUTORIALS = ROOT / "docs" / "tutorials"
SETTING = re.compile(r'export (\w+)=(\S+|"[^"]*")( +#.*)?')
COLORS = ("red", "green", "blue", "grey")
SHAPES = ("circle", "square", "triangle")
TIMEOUT_S = 500


def commands(name: str) -> tuple[list[str], list[str]]:
    """Names of the settings of a tutorial, and its blocks of commands after them."""
    settings, *blocks = re.findall(r"^```bash\n(.*?)^```$", (TUTORIALS / name).read_text(), re.DOTALL | re.MULTILINE)
    found = [SETTING.fullmatch(line) for line in settings.splitlines()]
    assert all(found), f"{name}: its first block holds settings alone"
    return [match[1] for match in found if match], blocks


def follow(name: str, values: dict[str, object], **environment: str) -> str:
    """Output of a tutorial's commands with these values of its settings; fails with the first command that does."""
    names, blocks = commands(name)
    assert names == list(values), f"{name} has the settings {names}"
    settings = [f"export {setting}={shlex.quote(str(value))}" for setting, value in values.items()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as a cluster that was started
        status = subprocess.run(
            ["bash", "-eux", "-o", "pipefail", "-c", "\n".join([*settings, *blocks])],
            cwd=ROOT, env=os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"} | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
        ).returncode  # fmt: skip
        output.seek(0)
        said = output.read()
    assert status == 0, said[-6000:]
    return said


def draw(path: Path, color: str, shape: str, seed: int) -> None:
    """A shape of one color somewhere on a light page."""
    image = Image.new("RGB", (96, 96), "white")
    x, y, r = np.random.default_rng(seed).integers((30, 30, 12), (66, 66, 28))
    box = (int(x - r), int(y - r), int(x + r), int(y + r))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (int(x), box[1])], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with twelve drawings in two folders, and a file that is no picture."""
    folder = tmp_path / "my photos"  # people have spaces in their folders
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        draw(folder / str(2024 + number % 2) / f"{color}-{shape}.png", color, shape, number)
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A table of 40 products with two drawings each, in the columns of the tutorial."""
    folder = tmp_path / "catalogue"
    rows = []
    for product in range(40):
        color, shape = COLORS[product % 4], SHAPES[product % 3]
        for view in range(2):
            image = f"images/{product:02}-{view}.png"
            draw(folder / image, color, shape, 100 * product + view)
            description = f"drawing {view} of a {color} {shape}" if view else ""
            rows.append([image, f"item-{product:02}", f"{color} {shape} {product}", description])
    with open(folder / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "sku", "title", "description"], *rows])
    return folder / "items.csv"


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    """A folder as `MODEL` names it: a CLIP of random weights with its tokenizer and image processor."""
    return save_pretrained("clip", tmp_path / "hub" / "clip")


@pytest.mark.slow
def test_search_my_photos(photos: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    values = {"PHOTOS": photos, "PHOTO": photos / "2024" / "red-circle.png", "QUERY": "a red circle", "WORK": work}
    values["CONFIG"] = "configs/smoke.yaml"
    output = follow("search-my-photos.md", values)
    assert "text to image" in output, "the table of scores"
    assert "1 .txt" in output, "what was passed over is told"
    html = (work / "results.html").read_text()
    assert "a red circle" in html and "red-circle.png" in html


@pytest.mark.slow
def test_fine_tune_on_my_catalogue(catalogue: Path, small_clip: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    values = {"CATALOGUE": catalogue, "WORK": work, "MODEL": small_clip, "GPU": "false", "STEPS": 20, "BATCH": 8}
    output = follow("fine-tune-on-my-catalogue.md", values)
    assert json.loads((work / "run" / "metrics.json").read_text())["split"] == "test"
    assert "(2, 12)" in output, "two sentences as vectors"
    assert re.search(r"^ +1 .*images/\d\d-\d\.png", output, re.MULTILINE), "a first result of the catalogue"


@pytest.mark.slow
def test_start_from_a_pretrained_model(photos: Path, catalogue: Path, small_clip: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    values = {"PHOTOS": photos, "QUERY": "a red circle", "MODEL": small_clip, "CATALOGUE": catalogue, "WORK": work}
    output = follow("start-from-a-pretrained-model.md", {**values, "STEPS": 20, "BATCH": 8})
    assert "27 objects added" in output
    tables = output.split("text to image")[1:]
    assert len(tables) == 3, "as it is, with references, fine-tuned"
    zero_shot, tuned = (json.loads((work / name / "metrics.json").read_text()) for name in ("zero-shot", "run"))
    assert (zero_shot["checkpoint_step"], zero_shot["split"], tuned["split"]) == (0, "test", "test")
    assert zero_shot["refinement"]["chosen_on"] == "val" and zero_shot["refinement"]["tried"]
    assert tuned["checkpoint_step"] > 0 and tuned["config_hash"] != zero_shot["config_hash"]
    assert "share" in json.loads((work / "model" / "config.json").read_text())["interpolation"]
    assert len(re.findall(r"^ +1 .*\.png$", output, re.MULTILINE)) == 2, "a first result of both models"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@pytest.fixture
def own_cluster() -> Iterator[dict[str, str]]:
    """Environment of a cluster that a tutorial starts, whose processes are found by it and ended."""
    mark = str(uuid.uuid4())
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rt", ignore_cleanup_errors=True) as folder:  # short, for sockets
        try:
            yield {"MMREF_TUTORIAL": mark, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        finally:
            started = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("MMREF_TUTORIAL") == mark:
                        started.append(process)
            for end in (psutil.Process.terminate, psutil.Process.kill):
                for process in started:
                    with contextlib.suppress(psutil.Error):
                        end(process)
                started = psutil.wait_procs(started, timeout=10)[1]


@pytest.mark.slow
def test_train_on_a_cluster(own_cluster: dict[str, str], tmp_path: Path) -> None:
    port, dashboard, agent = free_ports(3)
    values = {
        "DATA": ROOT / "data_shards" / "emoji", "RUN": tmp_path / "run", "CONFIG": "configs/smoke.yaml", "WORKERS": 2,
        "CPUS": 4, "PORT": port, "DASHBOARD": dashboard, "AGENT": agent,
    }  # fmt: skip
    output = follow("train-on-a-cluster.md", values, **own_cluster)
    assert "succeeded" in output and "text to image" in output
    assert "0 lost, 0 repeated" in output, "the ledger"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["split"] == "test"


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """docs/stage.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs" / "stage.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_site_and_links_to_what_is_there(
    stage: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.main(str(tmp_path / "pages")) == 0, capsys.readouterr().err
    assert (tmp_path / "pages" / "README.md").exists()


def test_a_link_to_code_becomes_one_to_a_page_and_a_broken_one_is_named(stage: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "docs" / "page.md").write_text(
        "[code](../code.py#L1) [folder](../docs) [gone](gone.md) [out](../../etc) `[no](link)` [web](https://a.org/b)\n"
        "```\n[no](link)\n```\n[anchor](page.md#here)\n"
    )
    staging = stage.Staging(tmp_path, tmp_path / "out")
    staging.add(tmp_path / "docs" / "page.md")
    assert staging.errors == [
        "docs/page.md:1: gone.md does not exist",
        "docs/page.md:1: ../../etc does not exist",
    ]
    page = (tmp_path / "out" / "docs" / "page.md").read_text()
    assert "[code](../code.py.md) [folder](files.md)" in page and "[anchor](page.md#here)" in page
    assert page.count("[no](link)") == 2, "what stands in code is no link"
    assert "a = 1" in (tmp_path / "out" / "code.py.md").read_text()
    assert "- `page.md`" in (tmp_path / "out" / "docs" / "files.md").read_text()

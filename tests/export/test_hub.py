"""Models by hub id, through huggingface_hub's own client, from a hub on the loopback; and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.hub import running_hub
from support.pretrained import PHOTOGRAPHS, TEXTS, own_features, save_pretrained

from mmref.errors import HubError
from mmref.export.write import export_pretrained
from mmref.storage.hub import hub_id

HERE = Path(__file__).parents[2]
ASKS = """
import sys
import numpy as np
import mmref
from mmref.errors import HubError
from mmref.run.models import find_model
from support.pretrained import PHOTOGRAPHS, TEXTS
target, *names = sys.argv[1:]
found = {}
for i, name in enumerate(names):
    try:
        model = mmref.load(name)
        found |= {f"image{i}": model.encode_images(PHOTOGRAPHS), f"text{i}": model.encode_text(TEXTS)}
        print(find_model(name).kind)
    except HubError as error:
        print(f"HubError: {error}")
np.savez(target, **found)
"""


def ask(folder: Path, endpoint: str, *names: str, **env: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a fresh process finds under some names: a line for each, and features."""
    given = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), f"{HERE}/tests"]), "no_proxy": "127.0.0.1",
    }  # fmt: skip
    given.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASKS, str(folder / "found.npz"), *names], env={**given, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "found.npz") as arrays:
        return done.stdout.splitlines(), dict(arrays)


def test_pretrained_models_and_exports_by_hub_id(tmp_path):
    own = save_pretrained("siglip2", tmp_path / "hub" / "google" / "small")
    export_pretrained(str(own), str(tmp_path / "hub" / "me" / "mine"))
    (tmp_path / "hub" / "me" / "empty").mkdir()
    image, text = own_features(own, PHOTOGRAPHS, TEXTS)
    names = ["google/small", "hf://google/small", "hf://me/mine", "me/mine"]
    with running_hub() as hub:
        hub.add(tmp_path / "hub")
        said, found = ask(tmp_path, hub.endpoint, *names, "nobody/nothing", "me/empty")
    assert said[:4] == ["pretrained", "pretrained", "export", "export"]
    assert said[4].startswith(f"HubError: nobody/nothing is no folder here, and {hub.endpoint} has no such model")
    assert said[5].startswith("HubError: me/empty has no config.json")
    for i in range(len(names)):
        assert np.abs(found[f"image{i}"] - image).max() < 1e-4
        assert np.abs(found[f"text{i}"] - text).max() < 1e-4
    # The hub has gone: what was fetched is still there, and what was not is named.
    said, again = ask(tmp_path, hub.endpoint, "google/small", "hf://me/mine", "google/other", HF_HUB_OFFLINE="1")
    assert said[:2] == ["pretrained", "export"] and np.array_equal(again["image0"], found["image0"])
    assert "google/other is no folder here, and" in said[2] and "cannot be reached (HF_HUB_OFFLINE is set)" in said[2]


def test_names_that_can_be_of_a_hub():
    assert (
        hub_id("openai/clip-vit-base-patch32") == hub_id("hf://openai/clip-vit-base-patch32/") == "openai/clip-vit-base-patch32"
    )
    assert [hub_id(name) for name in ("/a/b", "./a", "~/a", "a/b/c", "s3://a/b", "..", "")] == [None] * 7
    with pytest.raises(HubError, match="write hf://USER/REPO"):
        hub_id("hf://a/b/c")

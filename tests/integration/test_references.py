"""New objects get references by the command, and evaluation and further training use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.jobs import Job, losses, write_config

from mmref.cli import main
from mmref.cluster.connection import connect
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.evaluate.features import Encoder, read_pixels, read_queries
from mmref.run import checkpoints
from mmref.run.directory import RunDir


def held(run: Path) -> dict[str, torch.Tensor]:
    """{object id: reference (K, d)} of a run's best checkpoint."""
    there = RunDir(str(run))
    info = checkpoints.best_checkpoint(there)
    with checkpoints.fetched(there, info, "references") as folder:
        ids, rows = checkpoints.load_object_ids(folder, info.meta), checkpoints.load_references(folder, info.meta)
    return dict(zip(ids, rows))


def test_added_objects_have_the_mean_of_their_features_and_are_anchors_in_evaluation(make_config, tmp_path, monkeypatch, capsys):
    from support.tiny_run import UNSEEN, make_run
    from support.tiny_set import TinySource, build_tiny_set

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run, more = tmp_path / "run", build_tiny_set(tmp_path / "more", TinySource("more", first=100))
    config = make_config({"eval.bootstrap": 20, "eval.refine_weights": [0.4], "train.storage_gb": 0.2})
    model = make_run(config, str(run), {})
    before = held(run)
    index = ShardSet.open(str(more)).index("train")
    with connect(2, 0.2):
        assert main(["references", "add", str(run), "--data", str(more)]) == 0
        assert f"{index.n_objects} objects added" in capsys.readouterr().out
        assert main(["references", "add", str(run), "--data", str(more)]) == 1
        assert "all have references" in capsys.readouterr().err
        assert main(["evaluate", "--checkpoint", str(run), "--no-report"]) == 0
        with_more = json.loads((run / "metrics.json").read_text())
        added = held(run)
        assert main(["references", "remove", str(run), "--object", *list(index.object_ids)]) == 0
        assert main(["evaluate", "--checkpoint", str(run), "--no-report"]) == 0
    assert added.keys() - before.keys() == set(index.object_ids)
    encoder = Encoder(model, model, config.data, load_tokens(config), torch.device("cpu"))
    queries = read_queries(index)
    with encoder:
        image = encoder.images(read_pixels(SampleReader(index), range(len(index)), config.data)[0])
        text = encoder.texts(queries.texts)[queries.text]
    for row, name in enumerate(index.object_ids):
        mean = (image[index.object_row == row].mean(0) + text[queries.objects == row].mean(0)) / 2
        np.testing.assert_allclose(added[name][0].numpy(), mean, atol=1e-5)
    tried = [row for row in with_more["refinement"]["tried"] if row["kind"] == "sparse" and row["weight"] > 0]
    without = json.loads((run / "metrics.json").read_text())["refinement"]["tried"]
    assert tried and tried != [row for row in without if row["kind"] == "sparse" and row["weight"] > 0]
    assert held(run).keys() == before.keys() and len(before) == len(added) - index.n_objects and len(before) > UNSEEN


@pytest.mark.slow
def test_training_goes_on_with_old_and_new_objects(tiny_set, tmp_path):
    """A set without some of the old objects and with new ones: the others start from where the first run left them."""
    from support.tiny_set import TinySource, build_tiny_set, tiny_config

    overrides = {"train.max_steps": 6, "train.log_every": 1, "train.storage_gb": 0.2, "eval.bootstrap": 20}
    shifted = build_tiny_set(tmp_path / "shifted", TinySource("shifted", first=5))
    first, second = tmp_path / "first", tmp_path / "second"
    config = write_config(tiny_config(tiny_set, overrides), tmp_path)
    status, output = Job("train.py", "--config", str(config), "--run_dir", str(first)).wait()
    assert status == 0, output
    known = held(first)
    config = write_config(tiny_config(shifted, overrides), tmp_path)
    flags = ("--run_dir", str(second), "--train.start_from", str(first))
    status, output = Job("train.py", "--config", str(config), *flags, "--reference.momentum", "1.0").wait()
    assert status == 0, output
    found, ids = held(second), set(ShardSet.open(str(shifted)).train_object_ids())
    assert found.keys() == ids and ids & known.keys() and ids - known.keys()
    for name in ids & known.keys():  # with momentum 1 rows that are known stay
        if known[name].any():
            torch.testing.assert_close(found[name], known[name])
    assert losses(second)[1] != losses(first)[1]

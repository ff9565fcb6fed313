"""Neighbors of training objects, by references and by features, against a search written in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_run import UNSEEN, make_run, random_features

from mmref.cli import main
from mmref.data.neighbors import NONE, index_fingerprint, read_neighbors
from mmref.data.plan import build_plan
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import NeighborsError
from mmref.references import mine as mining
from mmref.references.mine import mine, nearest_objects, object_features
from mmref.run.checkpoints import FOLDER, fetched, latest_checkpoint
from mmref.run.directory import RunDir
from mmref.run.row_file import row_files


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def features(monkeypatch):
    """Features that no model has made, and no Ray."""
    monkeypatch.setattr(mining, "embed_splits", lambda *given: random_features(None, *given[0:1], None, *given[3:])[0])


@pytest.fixture
def run(make_config, tmp_path):
    """A run without references of the first UNSEEN objects."""
    path = str(tmp_path / "run")
    make_run(make_config({"reference.per_object": 2}), path, {})
    return path


def slow_nearest(rows, count):
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    found = []
    for a in range(len(rows)):
        cosines = {}
        for b in range(len(rows)):
            pairs = [
                float(x @ y)
                for i, x in enumerate(unit[a])
                for j, y in enumerate(unit[b])
                if rows[a, i].any() and rows[b, j].any()
            ]
            if b != a and pairs:
                cosines[b] = max(pairs)
        best = sorted(cosines, key=lambda b: -cosines[b])[:count]
        found.append((best, [cosines[b] for b in best]))
    return found


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_the_nearest_by_the_nearest_two_vectors(monkeypatch, at_once):
    monkeypatch.setattr(mining, "COSINES", at_once)
    rows = torch.randn(23, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.rand(23, 3, 1)
    rows[4, 1:] = 0  # two of its references were never set
    rows[9] = 0  # nothing is known of it
    nearest, cosine = nearest_objects(rows, 6)
    for row, (expected, values) in enumerate(slow_nearest(rows, 6)):
        if row == 9:
            assert (nearest[row] == NONE).all() and (cosine[row] == 0).all()
            continue
        assert nearest[row].tolist() == expected and 9 not in expected
        assert np.allclose(cosine[row], values, atol=1e-6)
    assert nearest_objects(rows[:4], 9)[0].shape == (4, 3), "there are no more others"


def test_features_of_an_object_are_the_means_of_its_images_and_captions(make_config):
    config = make_config()
    split = random_features(None, config, None, config.data.root, ["train"])[0]["train"]
    made = object_features(split)
    assert len(made) == split.index.n_objects
    for row in (0, 3, 7):
        image, text = (
            split.image[split.image_objects == row].mean(0),
            split.text[split.queries.text[split.queries.objects == row]].mean(0),
        )
        expected = image / np.linalg.norm(image) + text / np.linalg.norm(text)
        assert np.allclose(made[row], expected, atol=1e-6)


def test_a_run_with_all_references_is_mined_by_them(make_config, tmp_path, capsys):
    config = make_config({"reference.per_object": 2, "reference.update": "gradient"})
    make_run(config, str(tmp_path / "run"), {})  # random rows from the start
    assert main(["mine", str(tmp_path / "run"), "--count", "3"]) == 0
    said = capsys.readouterr().out
    assert "14 objects, 3 neighbors each by references" in said
    assert f"--data.neighbors {tmp_path}/run/neighbors.parquet" in said
    index = train_index(config)
    found = read_neighbors(str(tmp_path / "run" / "neighbors.parquet"), index)
    run = RunDir(str(tmp_path / "run"))
    info = latest_checkpoint(run)
    with fetched(run, info, "references") as folder, row_files(folder, info.meta) as files:
        rows = torch.cat([file.read("rows") for file in files])
    assert [(n.tolist()) for n in found.rows] == [best for best, _ in slow_nearest(rows, 3)]
    assert found.model.endswith(f" {FOLDER}/step-00000020-a")


def test_a_run_that_lacks_some_references_is_mined_by_features(run, features, make_config):
    assert UNSEEN > 0
    with pytest.raises(NeighborsError, match=r"has no references of some of the 14 objects: `mmref references add` makes them"):
        mine(run, by="references")
    made = mine(run, count=4)
    assert made.neighbors.by == "features" and made.place == f"{run}/neighbors.parquet"
    config = make_config()
    expected = nearest_objects(
        object_features(random_features(None, config, None, config.data.root, ["train"])[0]["train"])[:, None], 4
    )
    assert np.array_equal(made.neighbors.rows, expected[0])
    trained = make_config({"data.neighbors": made.place, "data.group_size": 2})
    assert len(build_plan(trained, train_index(trained))(0).objects) == 8


def test_neighbors_are_those_of_the_objects_that_were_drawn(make_config, tmp_path, features):
    drawn, other = (make_config({"data.max_objects": 6, "train.seed": seed}) for seed in (0, 7))
    make_run(drawn, str(tmp_path / "run"), {})
    made = mine(str(tmp_path / "run"), count=3, by="features")
    of_all = object_features(random_features(None, drawn, None, drawn.data.root, ["train"])[0]["train"])[:, None]
    whole = list(ShardSet.open(drawn.data.root).index("train").object_ids)
    index = train_index(drawn)
    assert np.array_equal(made.neighbors.rows, nearest_objects(of_all[[whole.index(i) for i in index.object_ids]], 3)[0])
    assert np.array_equal(read_neighbors(made.place, index).rows, made.neighbors.rows)
    assert train_index(other).n_objects == 6 and train_index(other).object_ids != index.object_ids
    with pytest.raises(NeighborsError, match="of another set"):
        read_neighbors(made.place, train_index(other))


def test_fewer_images_of_each_object_are_the_same_set_to_neighbors(make_config):
    whole, part = (train_index(make_config({"data.max_images": n})) for n in (0, 1))
    assert len(part) < len(whole) and index_fingerprint(part) == index_fingerprint(whole)


def test_a_mixture_is_mined_set_by_set(make_config, tmp_path, features):
    from support.tiny_set import TinySource, build_tiny_set

    other = build_tiny_set(tmp_path / "other", TinySource("other", 50))
    config = make_config({"data.mix": {str(other): 0.5}})
    make_run(config, str(tmp_path / "run"), {})
    out = str(tmp_path / "n.parquet")
    made = mine(str(tmp_path / "run"), out, count=10**12)
    index = train_index(config)
    first = index.first_objects[1]
    assert np.array_equal(read_neighbors(out, index).rows, made.neighbors.rows) and made.alone == 0
    assert made.neighbors.rows.shape == (index.n_objects, 13), "as many as a set has others"
    assert (made.neighbors.rows[:first] < first).all() and (made.neighbors.rows[first:] >= first).all()
    alone = mine(str(tmp_path / "run"), out, count=3, data=str(other))
    assert len(alone.neighbors.rows) == index.n_objects - first


def test_where_the_file_cannot_be_written_nothing_is_computed(run):
    with pytest.raises(Exception, match=r"--out .*cannot be written: there is no folder"):
        mine(run, "/nowhere/at/all/n.parquet")

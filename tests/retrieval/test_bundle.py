"""What an index keeps of its model, and of the set that the model was trained on."""

from __future__ import annotations

import shutil

import pytest

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import StorageError
from mmref.retrieval import index
from mmref.retrieval.bundle import CAPTIONS, own_training_split, read_reference_captions, write_reference_captions
from mmref.retrieval.searcher import Searcher


def fails(*_):
    raise StorageError("cannot read s3://bucket/set: NoCredentialsError.")


@pytest.mark.parametrize("root", ["foo://bucket/set", "/nowhere/set"])
def test_an_index_is_made_where_its_training_set_is_out_of_reach(split_index, folder, root, tmp_path, capsys):
    model = shutil.copytree(split_index / "model", tmp_path / "model")
    config = (model / "config.yaml").read_text("utf-8")
    own = Searcher(split_index).model.config.data.root
    assert own in config
    (model / "config.yaml").write_text(config.replace(own, root), "utf-8")
    assert index.create(str(folder), str(model), str(tmp_path / "out"), workers=0).items == 11
    assert not (tmp_path / "out" / "model" / CAPTIONS).exists()
    said = capsys.readouterr().err
    assert "the references get no captions, since the set that the model was trained on cannot be read" in said and root in said


@pytest.mark.parametrize("place", [(ShardSet, "open"), (ShardSet, "index"), (SampleReader, "read_metas")])
def test_captions_stay_out_where_storage_does_not_answer(split_index, place, tmp_path, monkeypatch, capsys):
    model = Searcher(split_index).model
    write_reference_captions(tmp_path, model.config, model.object_ids)
    assert set(read_reference_captions(tmp_path)) == set(model.object_ids) and not capsys.readouterr().err
    (tmp_path / CAPTIONS).unlink()
    monkeypatch.setattr(*place, fails)
    write_reference_captions(tmp_path, model.config, model.object_ids)
    assert read_reference_captions(tmp_path) == {} and "NoCredentialsError" in capsys.readouterr().err


def test_without_references_no_set_is_asked_for(split_index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ShardSet, "open", fails)
    config = Searcher(split_index).model.config
    write_reference_captions(tmp_path, config, [])
    assert not capsys.readouterr().err
    assert own_training_split(config, "nothing is done") is None and "nothing is done, since" in capsys.readouterr().err

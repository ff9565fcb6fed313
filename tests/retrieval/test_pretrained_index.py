"""A folder of photographs, a pretrained model and a sentence: an index without any training, and without Ray."""

from __future__ import annotations

import numpy as np
import pytest
from support.pretrained import PHOTOGRAPHS, TEXTS, own_features, photograph, save_pretrained
from support.services import client_of

from mmref import Searcher
from mmref.data.fit import Fitted
from mmref.errors import ModelError, ModelMismatchError
from mmref.retrieval import index
from mmref.retrieval.command import index_main
from mmref.retrieval.search_command import search_main


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """One whose crop is smaller than what it is cut from: an image that is made fit twice is another."""
    return save_pretrained("clip, old end token", tmp_path_factory.mktemp("hub") / "clip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, data in enumerate(PHOTOGRAPHS):
        (folder / f"{i}.jpg").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def made(clip, photos, tmp_path_factory):
    """An index, made by the command."""
    out = tmp_path_factory.mktemp("index") / "photos"
    assert index_main([str(photos), "--model", str(clip), "--out", str(out), "--workers", "0", "--device", "cpu"]) == 0
    return out


def test_an_index_holds_the_features_of_transformers(made, clip):
    searcher = Searcher(str(made))
    image, text = own_features(clip, PHOTOGRAPHS, TEXTS)
    rows = [int(name.removesuffix(".jpg")) for name in searcher.items["id"].to_pylist()]
    assert np.abs(np.concatenate([s.features for s in searcher.segments]) - image[rows]).max() < 1e-4
    found = searcher.search(TEXTS[0], top=3)
    best = np.argsort(-(text[0] @ image.T), kind="stable")[:3]
    assert [r.id for r in found] == [f"{i}.jpg" for i in best]
    assert found[0].score == pytest.approx(float((text[0] @ image.T).max()), abs=1e-4) and found[0].references == []


def test_an_image_as_the_query_finds_itself_in_every_way(made, photos):
    """Made fit once, whoever brings it: the searcher, the service, a heat map."""
    searcher = Searcher(str(made))
    assert searcher.search(image=str(photos / "7.jpg"), top=1)[0].score == pytest.approx(1, abs=1e-5)
    with client_of(made) as client:
        answer = client.post("/search", content=PHOTOGRAPHS[5], params={"top": 1}, headers={"content-type": "image/png"})
        assert answer.status_code == 200 and answer.json()["results"][0]["score"] == pytest.approx(1, abs=1e-5), answer.text
    explained = searcher.explain(TEXTS[0], "7.jpg", grid=2)
    assert explained.cosine == pytest.approx(searcher.search(TEXTS[0], top=8)[_rank(searcher, "7.jpg")].score, abs=1e-5)
    pixels = np.zeros((32, 32, 3), np.uint8)
    as_it_is, resized = (searcher.encode_pixels([given]) for given in (Fitted(pixels), pixels))
    assert np.allclose(as_it_is, resized, atol=1e-6), "a picture of one color is the same at every size"


def _rank(searcher, item):
    return next(i for i, r in enumerate(searcher.search(TEXTS[0], top=8)) if r.id == item)


def test_an_index_goes_on_with_its_model_and_refuses_another(made, clip, photos, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "new.jpg").write_bytes(photograph(20, 50, 70))
    index.add(str(made), str(tmp_path / "more"), str(clip), workers=0)
    assert len(Searcher(str(made))) == len(PHOTOGRAPHS) + 1
    other = save_pretrained("siglip", tmp_path / "siglip")
    with pytest.raises(ModelMismatchError, match="is not the model of"):
        index.add(str(made), str(photos), str(other), workers=0)
    with pytest.raises(ModelError, match="is none of these: a run directory"):
        index.create(str(photos), str(photos), str(tmp_path / "index"), workers=0)
    assert search_main([str(made), TEXTS[0], "--top", "2", "--device", "cpu"]) == 0 and ".jpg" in capsys.readouterr().out

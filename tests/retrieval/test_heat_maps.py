"""Heat maps over convolutional and transformer towers, and the references nearest to a query and an item."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_set import CONVNEXT, VIT

from mmref.errors import QueryError
from mmref.retrieval import index
from mmref.retrieval.heat_maps import hidden
from mmref.retrieval.searcher import Searcher


@pytest.fixture(params=["vit", "convnext"])
def searcher(request, make_config, tiny_set, tmp_path, monkeypatch):
    from support.tiny_run import make_run

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    towers = {"vit": VIT, "convnext": CONVNEXT}
    make_run(make_config({"model.vision_config": towers[request.param]}), str(tmp_path / "run"), {})
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "index"), split="test", workers=0)
    return Searcher(str(tmp_path / "index"))


def test_heat_is_what_hiding_a_part_costs(searcher):
    result = searcher.search("grey square 19", top=1)[0]
    found = searcher.explain("grey square 19", result.id)
    assert found.cosine == pytest.approx(result.initial, abs=1e-5)
    assert found.heat.shape == (7, 7) and np.abs(found.heat).max() > 0
    text = searcher.model.encode_text(["grey square 19"])[0]
    images = hidden(searcher.model.pixels([searcher.image_bytes(result.id)])[0], 7)
    lost = found.cosine - float(searcher.model.encode_images([images[1 + 7 * 2 + 3]])[0] @ text)
    assert found.heat[2, 3] == pytest.approx(lost, abs=1e-5), "third row from the top, fourth column"


def test_the_nearest_references_are_named(searcher):
    result = searcher.search("red circle 0", top=1)[0]
    found = searcher.explain("red circle 0", result.id)
    model = searcher.model
    references = model.references[:, 0] / np.linalg.norm(model.references[:, 0], axis=1, keepdims=True)
    query = references @ model.encode_text(["red circle 0"])[0]
    assert [r.object_id for r in found.query_references] == [model.object_ids[i] for i in np.argsort(-query)[:5]]
    assert found.query_references[0].query == pytest.approx(query.max(), abs=1e-5)
    item = references @ searcher.ranker.matrices[0][searcher.row(result.id)]
    assert found.item_references[0].object_id == model.object_ids[int(item.argmax())]
    assert found.references[0].object_id == model.object_ids[int(np.minimum(query, item).argmax())]
    assert found.references[0].caption


def test_only_the_patch_is_hidden():
    pixels = np.zeros((20, 10, 3), np.uint8)
    pixels[:10] = 200
    images = hidden(pixels, 5)
    assert len(images) == 26 and (images[0] == pixels).all()
    changed = (images[1] != pixels).any(2)  # the cell of the top left corner, widened by half its side
    assert changed[:6, :3].all() and changed.sum() == 18


def test_what_cannot_be_explained_is_said(searcher):
    with pytest.raises(QueryError, match="has no item"):
        searcher.explain("red", "nobody")
    with pytest.raises(QueryError, match="at least 1 cell"):
        searcher.explain("red", searcher.items["id"][0].as_py(), grid=0)

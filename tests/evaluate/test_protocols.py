"""Image to image and captions taken together, against twins written in loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_run import make_run, random_features
from support.tiny_set import TinySource, build_tiny_set, replace_json, tiny_config

from mmref.data.sample_reader import SampleReader
from mmref.errors import EvaluationError
from mmref.evaluate import evaluation
from mmref.evaluate.protocols import captions_as_one, image_to_image, protocols
from mmref.evaluate.refinement import (
    ReferenceSpace,
    RefinementSettings,
    candidates,
    reference_similarity,
    refine,
    refined_scores,
)
from mmref.evaluate.report import format_table
from mmref.evaluate.split_features import SplitFeatures


class Cameras(TinySource):
    """The tiny set, whose images are by cameras in turn; the first of each object names none."""

    def objects(self):
        for thing in super().objects():
            images = [
                replace(image, extra={} if not i else {"cam": f"c{i % 2}", "lens": i}) for i, image in enumerate(thing.images)
            ]
            yield replace(thing, images=images)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_set(tmp_path_factory.mktemp("cameras") / "set", Cameras("cameras"))


@pytest.fixture(scope="module")
def features(root: Path) -> SplitFeatures:
    return random_features(None, None, None, str(root), ["train"])[0]["train"]


def of_cameras(features: SplitFeatures) -> list[str | None]:
    reader = SampleReader(features.index)
    return [reader.read_meta(int(row)).get("cam") for row in features.image_rows]


def literal(scores: np.ndarray, objects: np.ndarray, cameras: list[str | None]) -> list[list[int]]:
    """Ranks of each image's hits among the images that its gallery has."""
    found = []
    for i, row in enumerate(scores):
        gallery = [
            j
            for j in range(len(row))
            if j != i and not (objects[j] == objects[i] and cameras[i] is not None and cameras[j] == cameras[i])
        ]
        order = sorted(gallery, key=lambda j: (-row[j], j))
        found.append([rank for rank, j in enumerate(order, 1) if objects[j] == objects[i]])
    return found


@pytest.mark.parametrize("field", ["", "cam"])
@pytest.mark.parametrize("settings", [None, RefinementSettings(weight=0.8, top_r=4, tau=0.1, top_p=9)])
def test_image_to_image_is_what_a_loop_finds(features, field, settings):
    protocol = image_to_image(features, field)
    image, objects = features.image, features.image_objects
    cameras = of_cameras(features) if field else [None] * len(image)
    scores = image @ image.T
    score_fn = None
    if settings is not None:
        space = ReferenceSpace(np.random.default_rng(5).normal(size=(10, 8)))
        score_fn = refined_scores(space, settings, image, image)
        similarity = reference_similarity(space.encode(image, settings), space.encode(image, settings, gallery=True))
        away = np.array([[r == s or (a == b and c is not None and c == d) for s, (b, d) in enumerate(zip(objects, cameras))]
                         for r, (a, c) in enumerate(zip(objects, cameras))])  # fmt: skip
        first = np.where(away, -2.0, scores).astype(np.float32)  # what is away is no candidate of the first pass either
        scores = refine(scores, similarity, settings.weight, candidates(first, 9))
    found = protocol.ranked(score_fn)
    expected = literal(scores, objects, cameras)
    assert found.first_rank.tolist() == [ranks[0] if ranks else 0 for ranks in expected]
    assert found.valid.tolist() == [bool(ranks) for ranks in expected] and not found.valid.all(), "objects of one image"
    for ranks, ap, inp in zip(expected, found.ap, found.inp):
        if ranks:
            assert ap == pytest.approx(np.mean([k / rank for k, rank in enumerate(ranks, 1)]))
            assert inp == pytest.approx(len(ranks) / ranks[-1])
    if field:
        assert protocol.about == {"same_camera": "cam", "without_camera": 14}
        assert found.n_excluded == image_to_image(features).ranked().n_excluded, "first images are by cameras of their own"


def test_a_field_that_no_sample_has_is_named_with_those_there_are(features):
    with pytest.raises(
        EvaluationError, match=r"train has the field 'camera' .*only object_id, image_id, captions.*--keep camera"
    ):
        image_to_image(features, "camera")


def test_a_query_of_several_captions_is_their_mean(features):
    q = features.queries
    rng = np.random.default_rng(3)
    text = rng.normal(size=features.text.shape).astype(np.float32)
    features = replace(features, text=text / np.linalg.norm(text, axis=1, keepdims=True))
    for of, named, objects in (
        ("image", q.images, features.index.object_row),
        ("object", q.objects, np.arange(features.index.n_objects)),
    ):
        protocol = captions_as_one(features, of)
        assert protocol.about == {"of": of, "n_captions": len(q.text)} and len(protocol.queries) == len(np.unique(named))
        for row, name in enumerate(np.unique(named)):
            mean = np.mean([features.text[t] for t, n in zip(q.text, named) if n == name], axis=0)
            np.testing.assert_allclose(protocol.queries[row], mean / np.linalg.norm(mean), atol=1e-6)
            assert protocol.objects[row] == objects[name]
        found = protocol.ranked()
        scores = protocol.queries @ features.image.T
        for i in (0, len(scores) - 1):
            order = sorted(range(len(features.image)), key=lambda j: (-scores[i, j], j))
            hits = [rank for rank, j in enumerate(order, 1) if features.image_objects[j] == protocol.objects[i]]
            assert found.first_rank[i] == hits[0] and found.inp[i] == pytest.approx(len(hits) / hits[-1])


def run_on(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(evaluation, "run_features", random_features)
    make_run(tiny_config(root, {"eval.bootstrap": 20, "eval.examples": 0, **changes}), str(path), {})
    return str(path)


def test_a_run_reports_what_its_config_or_the_command_asks_for(root, tmp_path, monkeypatch):
    run = run_on(root, tmp_path / "run", monkeypatch, **{"eval.captions_as_one": "object"})
    plain = evaluation.evaluate_run(run, report=False)
    assert "image_to_image" not in plain and plain["captions_as_one"]["of"] == "object"
    asked = evaluation.evaluate_run(run, changes=evaluation.changed_options(True, None, "image"))
    assert {k: asked[k] for k in ("initial", "refined", "refinement", "ci95")} == {
        k: plain[k] for k in ("initial", "refined", "refinement", "ci95")
    }, "what is asked for besides changes nothing else"
    block = asked["image_to_image"]
    found, space = random_features(None, None, None, str(root), ["test", "val"])
    protocol = image_to_image(found["val"])
    best = protocol.choose(tiny_config(root, {}), space, "val")
    assert block["refinement"] == best.to_dict() and block["refinement"]["chosen_on"] == "val"
    assert max(best.tried, key=lambda row: row["mAP"])["weight"] == block["refinement"]["weight"]
    assert block["initial"]["mAP"] == pytest.approx(100 * image_to_image(found["test"]).ranked().ap.sum() / 
                                                    (block["n_queries"] - block["n_excluded"]))  # fmt: skip
    assert asked["captions_as_one"]["of"] == "image" and asked["captions_as_one"]["n_queries"] == asked["n_gallery"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Image to image" in page and "the captions of each image as one query" in page and "NDCG@10 and MRR" in page
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["image_to_image"] == block


def test_without_references_there_was_no_setting_to_try(root, tmp_path, monkeypatch):
    """As for captions: there is a val split, which had no choice."""
    run = run_on(root, tmp_path / "run", monkeypatch)
    without = lambda *given: (random_features(*given)[0], None)  # noqa: E731
    monkeypatch.setattr(evaluation, "run_features", without)
    metrics = evaluation.evaluate_run(run, report=False, changes=evaluation.changed_options(True, None, "object"))
    said = [line for line in format_table(metrics).splitlines() if line.startswith("refinement")]
    assert len(said) == 3 and all(line.endswith("none: there was no setting to try") for line in said)
    blocks = metrics, metrics["image_to_image"], metrics["captions_as_one"]
    assert {block["refinement"]["chosen_on"] for block in blocks} == {"val"}


def test_where_val_has_nothing_to_find_nothing_is_chosen(features, root):
    lone = np.unique(features.image_objects, return_index=True)[1]
    alone = replace(features, image=features.image[lone], image_rows=features.image_rows[lone])
    space = ReferenceSpace(np.random.default_rng(0).normal(size=(4, 8)))
    protocol = image_to_image(alone)
    chosen = protocol.choose(tiny_config(root, {}), space, "val")
    assert chosen.chosen_on == "" and chosen.settings.weight == 0 and not chosen.tried
    with pytest.raises(EvaluationError, match=r"`eval.image_to_image`: none of the 14 queries .* Leave that option out"):
        protocol.scores("image_to_image", space, chosen, 20)


def test_a_field_of_cameras_asks_for_image_to_image(features, root):
    assert not protocols(tiny_config(root, {}), features)
    found = protocols(tiny_config(root, {"eval.same_camera": "cam"}), features)
    assert list(found) == ["image_to_image"] and found["image_to_image"].about["same_camera"] == "cam"


def test_a_broken_record_costs_its_camera_alone(tmp_path):
    root = build_tiny_set(tmp_path / "set", Cameras("broken"))
    found = random_features(None, None, None, str(root), ["train"])[0]["train"]
    row = of_cameras(found).index("c1")
    replace_json(root, row, "{", "train")
    assert image_to_image(found, "cam").about["without_camera"] == 15

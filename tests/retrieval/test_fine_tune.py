"""A training from judgements: how they are divided, what is built of them, which config it has, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmref.cli import main
from mmref.config import read_yaml
from mmref.data.neighbors import NONE, read_neighbors
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import ConfigError, TooFewJudgementsError, UsageError
from mmref.export.model import load
from mmref.retrieval import fine_tune, index
from mmref.retrieval.feedback import Judgement, Judgements
from mmref.retrieval.fine_tune import build_set, check_enough, divide, judge_models, prepare
from mmref.retrieval.fine_tune_command import places
from mmref.retrieval.searcher import Searcher


def said(query: str, item: str, relevant: bool = True) -> Judgement:
    return Judgement(query, item, None, relevant, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def judged(own_index: Path) -> Path:
    """An index in which 40 sentences have two right items and two wrong ones each."""
    searcher, rng = Searcher(own_index), np.random.default_rng(0)
    judgements, ids = Judgements.of(searcher.index), searcher.items["id"].to_pylist()
    for number in range(40):
        for place, row in enumerate(rng.permutation(len(ids))[:4].tolist()):
            judgements.save(searcher, f"sentence {number}", ids[row], place < 2)
    return own_index


def test_all_judgements_of_a_sentence_are_on_one_side():
    all_of_them = [said(f"q{i % 20}", f"item {i}") for i in range(100)]
    left, held = divide(all_of_them, 0.3, seed=1)
    assert {j.query for j in left}.isdisjoint({j.query for j in held})
    assert len({j.query for j in held}) == 6 and len(left) + len(held) == 100
    again = divide(all_of_them[::-1], 0.3, seed=1)
    assert {j.query for j in again[1]} == {j.query for j in held}, "whatever the order"
    assert {j.query for j in divide(all_of_them, 0.3, seed=2)[1]} != {j.query for j in held}


def test_too_few_are_named():
    enough = [said(f"q{i}", x, x == "a") for i in range(10) for x in "ab"]
    check_enough(enough, enough)
    with pytest.raises(TooFewJudgementsError, match=r"to train on are of 9 sentences with something right.*at least 10"):
        check_enough(enough[2:], enough)
    with pytest.raises(TooFewJudgementsError, match="held out are of 0 sentences with right and wrong"):
        check_enough(enough, [j for j in enough if j.relevant])


def test_what_is_built_leaves_out_held_out_sentences(judged, tmp_path):
    searcher = Searcher(judged)
    ids, captions = (searcher.items[name].to_pylist() for name in ("id", "caption"))
    some = [said("right for this", ids[0]), said("right for this", ids[1], False), said("right for this", ids[-1], False)]
    left_out = build_set(searcher, some, tmp_path / "of", False, {captions[1]})
    assert [line.split(":")[0] for line in left_out] == [ids[1]] and "held-out sentence" in left_out[0]
    shards = ShardSet.open(str(tmp_path / "of" / "set"))
    reader = SampleReader(shards.index("train"))
    assert sorted(reader.read_meta(i)["captions"][0] for i in range(2)) == sorted(["right for this", captions[-1]])
    before = shards.fingerprint
    build_set(searcher, some, tmp_path / "of", False, {captions[1]})
    assert ShardSet.open(str(tmp_path / "of" / "set")).fingerprint == before, "the same again, to be resumed"


def test_the_config_goes_on_from_the_model_with_its_own_set(judged, tiny_set, tmp_path):
    searcher = Searcher(judged)
    judgements = Judgements.of(searcher.index).read()
    found = prepare(searcher, judgements, str(tmp_path / "run"), ["--train.max_steps", "7"], seed=3)
    config, base = found.config, searcher.model.config
    assert Path(config.data.root) == tiny_set and list(config.data.mix.values()) == [0.5]
    assert config.train.start_from == str(judged / "model") and config.train.max_steps == 7
    assert config.train.lr == pytest.approx(fine_tune.LR_SHARE * base.train.lr) and config.loss.w_guide == 0
    assert len({j.query for j in found.held_out}) == 12 and len({j.query for j in found.trained_on}) == 28
    assert {j.query for j in found.held_out} == {j.query for j in divide(judgements, 0.3, 3)[1]}

    index = train_index(config)
    rows = read_neighbors(config.data.neighbors, index).rows
    first = index.first_objects[1]
    assert (rows[:first] == NONE).all() and (rows[first:] != NONE).any()
    names = {name.split("/", 1)[1]: first + i for i, name in enumerate(index.object_ids[first:])}
    near = set()
    for query in {j.query for j in found.trained_on}:
        of = {
            kind: {names[j.object_id] for j in found.trained_on if j.query == query and j.relevant is kind}
            for kind in (True, False)
        }
        near |= {(a, b) for a in of[True] for b in of[False] - of[True]}
    assert {tuple(sorted((a, b))) for a in range(first, len(rows)) for b in rows[a][rows[a] != NONE].tolist()} == {
        tuple(sorted(pair)) for pair in near
    }, "wrong ones lie beside what was right"

    searcher.model.config.data.max_objects = 3  # of the model's own training
    again = prepare(searcher, judgements, str(tmp_path / "again"), seed=3).config
    assert again.data.max_objects == 0 and np.array_equal(read_neighbors(again.data.neighbors, index).rows, rows)
    few = prepare(searcher, judgements, str(tmp_path / "few"), ["--data.max_objects", "16"], seed=3).config
    drawn = train_index(few)
    pairs = {
        frozenset((drawn.object_ids[a], drawn.object_ids[b]))
        for a, others in enumerate(read_neighbors(few.data.neighbors, drawn).rows.tolist())
        for b in others
        if b != NONE
    }
    whole_pairs = {frozenset(index.object_ids[row] for row in pair) for pair in near}
    assert pairs == {pair for pair in whole_pairs if pair <= set(drawn.object_ids)}, "only those that were drawn"

    alone = prepare(searcher, judgements, str(tmp_path / "alone"), mixed=False).config
    assert not alone.data.mix and sorted(ShardSet.open(alone.data.root).splits) <= ["train", "val"]


@pytest.mark.parametrize("root", ["foo://bucket/set", "/nowhere/set"])
def test_judgements_are_trained_on_alone_where_the_own_set_is_out_of_reach(judged, root, tmp_path, capsys):
    searcher = Searcher(judged)
    searcher.model.config.data.root = root
    found = prepare(searcher, Judgements.of(searcher.index).read(), str(tmp_path / "run"))
    assert found.config.data.root == str(tmp_path / "run" / "judgements" / "set") and not found.config.data.mix
    assert "trained on alone, since the set that the model was trained on cannot be read" in capsys.readouterr().err


def test_the_same_model_gains_nothing(judged):
    searcher = Searcher(judged)
    found = judge_models(searcher, load(judged / "model"), Judgements.of(searcher.index).read())
    assert (found["gallery"], found["left_out"]) == (len(searcher), 0) and found["held_out"] == {"judgements": 160, "queries": 40}
    for kind in ("initial", "refined"):
        for measure in found[kind].values():
            assert measure["queries"] == 40 and abs(measure["change"]["mean"]) < 1e-3


@pytest.fixture
def judged_photos(folder, run, tmp_path: Path) -> Path:
    """An index of a folder in which 40 sentences have a right item and two wrong ones each; 10.png is not judged."""
    index.create(str(folder), str(run), str(tmp_path / "photos"), workers=0)
    searcher, names = Searcher(tmp_path / "photos"), ["00.png", "deep/01.png", "02.png", "deep/03.png", "04.png", "deep/05.png"]
    for number in range(40):
        for place in range(3):
            Judgements.of(searcher.index).save(searcher, f"sentence {number}", names[(number + 2 * place) % 6], place == 0)
    return tmp_path / "photos"


def test_images_that_are_gone_are_left_out_of_the_gallery(judged_photos, folder, capsys):
    searcher = Searcher(judged_photos)
    judgements = Judgements.of(searcher.index).read()
    (folder / "10.png").unlink()
    (folder / "00.png").write_bytes(b"no image any more")
    found = judge_models(searcher, load(judged_photos / "model"), judgements)
    assert (found["gallery"], found["left_out"]) == (9, 2)
    assert found["held_out"] == {"judgements": 100, "queries": 40}
    assert "2 images of the index cannot be read and are left out" in capsys.readouterr().err
    others = [j for j in judgements if j.id != "00.png"]
    assert found["initial"]["pairs"]["queries"] == len({j.query for j in others if j.relevant})
    assert all(abs(measure["change"]["mean"]) < 1e-3 for measure in found["initial"].values())
    for path in folder.rglob("*.png"):
        path.unlink()
    found = judge_models(searcher, load(judged_photos / "model"), judgements)
    assert (found["gallery"], found["left_out"], found["initial"]) == (0, 11, {}), "a training is not lost for it"


def test_too_few_held_out_images_are_named_before_the_training(judged_photos, folder, tmp_path, capsys):
    searcher = Searcher(judged_photos)
    judgements = Judgements.of(searcher.index).read()
    (folder / "00.png").unlink()
    assert all(j.id != "00.png" for j in prepare(searcher, judgements, str(tmp_path / "run"), mixed=False, held_out=0.6).held_out)
    assert "1 held-out images cannot be read and are left out" in capsys.readouterr().err
    for name in ("02.png", "04.png"):
        (folder / name).unlink()
    judgements = [j for j in judgements if not j.id.startswith("deep/")]
    with pytest.raises(TooFewJudgementsError, match="held out are of 0 sentences"):
        prepare(searcher, judgements, str(tmp_path / "other"), mixed=False, held_out=0.5)
    assert "3 held-out images cannot be read" in capsys.readouterr().err


def test_where_judgements_lie(judged, tmp_path):
    assert places(str(judged), None) == (str(judged), None)
    file = str(judged / "judgements.jsonl")
    assert places(file, None) == (str(judged), file)
    (tmp_path / "elsewhere.jsonl").write_text("")
    assert places(str(tmp_path / "elsewhere.jsonl"), str(judged)) == (str(judged), str(tmp_path / "elsewhere.jsonl"))
    with pytest.raises(UsageError, match="name the index whose results were judged with --index"):
        places(str(tmp_path / "elsewhere.jsonl"), None)


def test_an_unknown_field_is_said(judged, tmp_path):
    searcher = Searcher(judged)
    with pytest.raises(ConfigError, match="unknown config key"):
        prepare(searcher, Judgements.of(searcher.index).read(), str(tmp_path / "run"), ["--train.speed", "7"])


@pytest.mark.ray
def test_one_command_trains_evaluates_and_reports(judged, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--train.max_steps", "4", "--train.warmup_steps", "1", "--eval.bootstrap", "20", "--eval.workers", "0"]
    assert main(["train", "--from-judgements", str(judged), "--run_dir", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert "training on 112 judgements of 28 sentences" in out and "held-out judgements: 48 of 12 sentences" in out
    found = json.loads((run / "judgements.json").read_text())
    assert found["checkpoint"] == json.loads((run / "metrics.json").read_text())["checkpoint"]
    assert "Held-out judgements" in (run / "report.html").read_text()
    assert read_yaml(str(run / "config.yaml"))["train"]["start_from"] == str(judged / "model")
    assert main(["evaluate", "--checkpoint", str(run), "--workers", "0"]) == 0
    assert "Held-out judgements" in (run / "report.html").read_text(), "a report that is written again keeps it"

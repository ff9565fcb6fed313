"""Judgements: kept, exported, and built into a shard set that a split of an evaluation reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import QueryError
from mmref.evaluate.features import read_queries
from mmref.retrieval import index
from mmref.retrieval.feedback import Judgements, export_table
from mmref.retrieval.fine_tune import build_set
from mmref.retrieval.searcher import Searcher
from mmref.shards.build import BuildOptions, build_shards, make_source


def test_the_last_judgement_of_a_pair_counts(own_index):
    searcher = Searcher(str(own_index))
    judgements = Judgements.of(searcher.index)
    first, second = searcher.items["id"][0].as_py(), searcher.items["id"][1].as_py()
    judgements.save(searcher, "red circle", first, False)
    judgements.save(searcher, " red circle ", second, False)
    judgements.save(searcher, "red circle", first, True)
    found = judgements.read()
    assert [(j.id, j.relevant) for j in found] == [(first, True), (second, False)]
    assert found[0].object_id == searcher.item(first)["object_id"]
    judgements.save(searcher, "red circle", second, None)
    assert [(j.id, j.relevant) for j in judgements.read()] == [(first, True)], "taken back"
    pasted = "red\u2028circle"  # Unicode's own end of a line
    judgements.save(searcher, pasted, first, True)
    assert judgements.read()[-1].query == pasted
    with pytest.raises(QueryError, match="has no item 'nobody'"):
        judgements.save(searcher, "red", "nobody", True)
    with pytest.raises(QueryError, match="needs the sentence"):
        judgements.save(searcher, " ", first, True)
    path = own_index / "judgements.jsonl"
    path.write_text(path.read_text().rstrip("\n") + "\n\n \n" + path.read_text().rstrip("\n"))  # as an editor may leave it
    judgements.save(searcher, "blue", first, True)
    assert [(j.query, j.id) for j in judgements.read()] == [("red circle", first), (pasted, first), ("blue", first)]
    with open(path, "a") as file:
        file.write('{"query": "half')
    with pytest.raises(QueryError, match="line 14 is no judgement"):
        judgements.read()


def build(table: Path, out: Path) -> ShardSet:
    build_shards(make_source("table", path=str(table)), str(out), BuildOptions(workers=0, min_shards=1, progress=False))
    return ShardSet.open(str(out))


def test_judgements_become_an_evaluation_split(own_index, tmp_path):
    """Images of a shard set, whose bytes are copied out; object ids are kept."""
    searcher = Searcher(str(own_index))
    judgements = Judgements.of(searcher.index)
    ids = searcher.items["id"].to_pylist()
    judgements.save(searcher, "a very red circle", ids[0], True)
    judgements.save(searcher, "another sentence", ids[0], True)
    judgements.save(searcher, "a very red circle", ids[-1], False)
    rows, left_out = export_table(searcher, judgements.read(), str(tmp_path / "table"), split="test")
    assert (rows, left_out) == (2, [])
    shards = build(tmp_path / "table" / "table.jsonl", tmp_path / "set")
    assert shards.splits == ["test"]
    split = shards.index("test")
    queries = read_queries(split)
    said = {split.object_ids[o]: {queries.texts[t] for t in queries.text[queries.objects == o]} for o in range(2)}
    of = {i: searcher.item(i) for i in (ids[0], ids[-1])}
    assert said[of[ids[0]]["object_id"]] == {"a very red circle", "another sentence"}
    assert said[of[ids[-1]]["object_id"]] == {of[ids[-1]]["caption"]}, "a wrong result is told by its own caption"
    assert SampleReader(split).read(0).image_bytes in {searcher.image_bytes(i) for i in of}


def test_images_without_objects_are_joined_by_sentences(folder, run, tmp_path):
    index.create(str(folder), str(run), str(tmp_path / "index"), workers=0)
    searcher = Searcher(str(tmp_path / "index"))
    judgements = Judgements.of(searcher.index, str(tmp_path / "j.jsonl"))
    pairs = [("a", "00.png"), ("a", "02.png"), ("b", "02.png"), ("b", "04.png"), ("c", "06.png")]
    for query, item in pairs:
        judgements.save(searcher, query, item, True)
    judgements.save(searcher, "c", "08.png", False)
    judgements.save(searcher, "c", "10.png", True)
    (folder / "10.png").unlink()
    rows, left_out = export_table(searcher, judgements.read(), str(tmp_path / "table"))
    assert rows == 4 and len(left_out) == 2
    assert "08.png: relevant to nothing, and no caption" in left_out[0] and "10.png" in left_out[1]
    table = [json.loads(line) for line in (tmp_path / "table" / "table.jsonl").read_text().splitlines()]
    objects = {row["item"]: row["object_id"] for row in table}
    assert objects["00.png"] == objects["02.png"] == objects["04.png"] != objects["06.png"]
    shards = build(tmp_path / "table" / "table.jsonl", tmp_path / "set")
    assert sum(entry["images"] for entry in shards.manifest["splits"].values()) == 4


def test_nothing_to_export_is_said(own_index, tmp_path):
    searcher = Searcher(str(own_index))
    with pytest.raises(QueryError, match="does not exist: judge results first"):
        Judgements.of(searcher.index).read()
    with pytest.raises(QueryError, match="no judged item can be exported"):
        export_table(searcher, [], str(tmp_path / "table"))


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(own_index, tmp_path):
    searcher, out = Searcher(str(own_index)), tmp_path / "table"
    judgements = Judgements.of(searcher.index)
    ids = searcher.items["id"].to_pylist()

    def contents() -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    for item in ids[:3]:
        judgements.save(searcher, "a red\u2028circle", item, True)
    export_table(searcher, judgements.read(), str(out))
    (out / "images" / "mine.png").write_bytes(b"mine")
    before = contents()
    assert len(before) == 5
    with pytest.raises(QueryError, match="no judged item can be exported"):
        export_table(searcher, [], str(out))
    assert contents() == before, "an export that fails leaves the one before"
    export_table(searcher, judgements.read()[:1], str(out))
    assert {n for n in contents() if "000000" not in n} == {"table.jsonl", "images/mine.png"}, "nothing of the old is left"

    shutil.rmtree(out)
    (out / "images").mkdir(parents=True)
    for name, text in (("images/000000.png", "mine"), ("table.jsonl", '{"image": "images/000000.png"}\n')):
        (out / name).write_text(text)
        mine = contents()
        with pytest.raises(QueryError, match="holds files that are no table of judgements"):
            export_table(searcher, judgements.read(), str(out))
        assert contents() == mine


def test_captions_that_are_numbers_are_texts(own_index, tmp_path):
    """As indexes of older versions have them."""
    searcher = Searcher(str(own_index))
    captions = pa.array(range(len(searcher)), pa.int64())
    searcher.items = searcher.items.set_column(searcher.items.column_names.index("caption"), "caption", captions)
    judgements, ids = Judgements.of(searcher.index), searcher.items["id"].to_pylist()
    for row, relevant in ((0, False), (1, True), (2, False)):
        judgements.save(searcher, "2", ids[row], relevant)
    export_table(searcher, judgements.read(), str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "table.jsonl").read_text("utf-8").splitlines()]
    assert {row["item"]: row["captions"] for row in rows} == {ids[0]: ["0"], ids[1]: ["2"], ids[2]: ["2"]}
    left_out = build_set(searcher, judgements.read(), tmp_path / "of", False, {"2"})
    assert left_out == [f"{ids[2]}: its caption is a held-out sentence"]

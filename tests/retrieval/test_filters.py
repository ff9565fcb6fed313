"""The language of filters: how it is read, what it matches by the type of a column, and the types that sources tell."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import write_images
from support.services import client_of

from mmref.cli import main
from mmref.errors import FilterError, QueryError, UnknownColumnError
from mmref.retrieval import index
from mmref.retrieval.columns import metadata_column
from mmref.retrieval.filters import Condition, Where, matches, read_filter, read_where, typed
from mmref.retrieval.searcher import CACHED_FILTERS, Searcher


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("split=val", ("split", "=", "val")),
        (" price >= 10 ", ("price", ">=", "10")),
        ("price<=-1.5", ("price", "<=", "-1.5")),
        ("a b!=c=d", ("a b", "!=", "c=d")),
        ("title~hat", ("title", "~", "hat")),
        ("caption=cat in hat", ("caption", "=", "cat in hat")),
        ("caption=", ("caption", "=", "")),
        ("color in red, blue", ("color", "in", "red", "blue")),
        ('color in "light, blue",red', ("color", "in", "light, blue", "red")),
        ("color is missing", ("color", "missing")),
        ("color is not missing", ("color", "present")),
        ('title=" <b>"', ("title", "=", " <b>")),
        ('title="he said ""no"""', ("title", "=", 'he said "no"')),
        ('"a=b"="=c"', ("a=b", "=", "=c")),
        ("note=two\nlines", ("note", "=", "two\nlines")),
        ('color in " light", red ,"a\nb"', ("color", "in", " light", "red", "a\nb")),
        ("color in a\rb,", ("color", "in", "a\rb", "")),
        ('color in "x"y,"z', ("color", "in", '"x"y', '"z')),
        (" color  is  missing ", ("color", "missing")),
    ],
)
def test_filters_are_read(text, expected):
    column, op, *values = expected
    assert read_filter(text) == Condition(column, op, tuple(values))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("split", "not of the form COLUMN=VALUE"),
        ("=3", "not of the form"),
        ("", "not of the form"),
        (" \n ", "not of the form"),
        ("price=>10", "unknown operator '=>'"),
        ("price==10", "unknown operator '=='"),
        ("name!~x", "unknown operator '!~'. Known are =, !=, <, <=, >, >=, ~ (contains), in, is missing"),
    ],
)
def test_what_is_no_filter_is_named(text, said):
    with pytest.raises(FilterError) as found:
        read_filter(text)
    assert said in str(found.value)


def test_a_filter_may_be_given_in_several_ways():
    one = Condition("split", "=", ("val",))
    assert read_where(None) == () and read_where("split=val") == read_where(["split=val"]) == read_where(one) == (one,)
    assert read_where([one, "price<3"]) == (one, Condition("price", "<", ("3",)))
    assert read_where({"split": "val", "price": 3}) == (one, Condition("price", "=", (3,)))
    assert read_where({"color": None}) == (Condition("color", "missing"),)
    assert read_where({"color": ["red", "blue"]}) == (Condition("color", "in", ("red", "blue")),)
    assert read_where([{"split": "val", "color": None}, "price<3"]) == (
        one,
        Condition("color", "missing"),
        Condition("price", "<", ("3",)),
    )
    assert read_where("") == read_where([]) == read_where({}) == ()


def test_several_values_come_as_what_holds_them():
    for held in (np.array([3, 5]), pd.Series([3, 5]), pa.array([3, 5]), range(3, 7, 2), {3: 0, 5: 0}.keys(), (n for n in (3, 5))):
        assert read_where({"count": held}) == (Condition("count", "in", (3, 5)),)
    for held in (np.array(["a", "b"]), pd.Series(["a", "b"]), pd.Index(["a", "b"]), pd.Categorical(["a", "b"])):
        assert read_where({"name": held}) == (Condition("name", "in", ("a", "b")),)
    for missing in (np.nan, pd.NaT, np.datetime64("NaT")):
        assert read_where({"name": missing}) == (Condition("name", "missing"),)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"count": np.int64(10)}, [1]),
        ({"count": np.array(10)}, [1]),
        ({"count": pd.Series([10, -3])}, [1, 4]),
        ({"price": np.float32(1.5)}, [0]),
        ({"name": np.str_("9")}, [4]),
        ({"name": np.array(["9", "Red hat"])}, [0, 4]),
        ({"name": pd.Series(["9", "Red hat"])}, [0, 4]),
        ({"sold": np.bool_(True)}, [0, 3]),
        ({"sold": np.array([True])}, [0, 3]),
        ({"taken": date(2024, 5, 1)}, [1]),
        ({"taken": np.array(["2024-05-01", "2023-01-01"], "datetime64[D]")}, [1, 3]),
        ({"seen": pd.Timestamp("2024-05-01T18:30")}, [1]),
        ({"seen": np.datetime64("2024-05-01T18:30", "ns")}, [1]),
        ({"seen": pd.Series(pd.to_datetime(["2024-05-01T18:30", "2024-05-02T00:00"]))}, [1, 4]),
        ({"seen": np.array(["2024-05-01T18:30"], "datetime64[ns]")}, [1]),
        ({"sent": pd.Timestamp("2024-05-01T12:00", tz="UTC")}, [0]),
        (Condition("count", "<", (np.int64(2),)), [0, 4]),
    ],
)
def test_values_of_numpy_and_pandas_are_those_of_python(where, rows):
    assert found(where) == rows


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([5], "5 is no filter: give a text such as 'price<20', or a mapping"),
        (5, "5 is no filter"),
        ({"name": b"9"}, "name is compared with texts, numbers, dates or times, not with b'9'"),
        ({"name": {"=": "9"}}, "not with {'=': '9'}"),
        ({"name": np.array([["9"], ["x"]])}, "not with ['9']"),
        ({"name": pd.Series(["9", None])}, "nan among them: `is missing` finds what has no value"),
    ],
)
def test_what_is_no_value_is_named(where, said):
    with pytest.raises(FilterError) as problem:
        found(where)
    assert said in str(problem.value)


@pytest.mark.parametrize("text", [" " * 20_000 + "y", " " * 20_000, "a in " + ", " * 10_000 + '"', '"' * 20_001, "x is " * 4000])
def test_reading_comes_to_an_end(text):
    """Where white space is divided between parts of a filter in every way, as many letters take hours."""
    with contextlib.suppress(FilterError):
        assert read_filter(text).op == "in"


ITEMS = pa.table(
    {
        "name": ["Red hat", "blue HAT", "", None, "9"],
        "count": pa.array([1, 10, None, 2**60 + 1, -3], pa.int64()),
        "price": pa.array([1.5, None, 10.0, 9.0, 0.1], pa.float64()),
        "taken": pa.array([date(2024, 4, 30), date(2024, 5, 1), None, date(2023, 1, 1), date(2025, 1, 1)], pa.date32()),
        "seen": pa.array(
            [datetime(2024, 5, 1), datetime(2024, 5, 1, 18, 30), datetime(2024, 4, 30, 23, 59, 59), None, datetime(2024, 5, 2)],
            pa.timestamp("us"),
        ),
        "sent": pa.array([datetime(2024, 5, 1, 12, tzinfo=UTC), None, None, None, None], pa.timestamp("us", "UTC")),
        "sold": [True, False, None, True, False],
    }
)


def found(where: Where) -> list[int]:
    types = {field.name: field.type for field in ITEMS.schema}
    return np.flatnonzero(matches(typed(read_where(where), types, "it"), ITEMS)).tolist()


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["name=Red hat"], [0]),
        (["name!=Red hat"], [1, 2, 4]),
        (["name~hat"], [0, 1]),
        (["name~(hat"], []),
        (["name in Red hat,9"], [0, 4]),
        (["name>=b"], [1]),
        (["name is missing"], [2, 3]),
        (["name is not missing"], [0, 1, 4]),
        (["count=10"], [1]),
        (["count=010"], [1]),
        (["count=1152921504606846977"], [3]),
        (["count!=10"], [0, 3, 4]),
        (["count>0.5", "count<1e1"], [0]),
        (["count in 1,-3"], [0, 4]),
        (["count is missing"], [2]),
        (["price>=9"], [2, 3]),
        (["price=0.1"], [4]),
        (["price in 10,1.5"], [0, 2]),
        (["price in 9007199254740993,1.5"], [0]),
        (["count in 1152921504606846977,1.5"], [3]),
        (["taken<2024-05-01"], [0, 3]),
        (["taken=2024-05-01"], [1]),
        (["taken in 2024-05-01,2025-01-01"], [1, 4]),
        (["seen=2024-05-01"], [0, 1]),
        (["seen<=2024-05-01"], [0, 1, 2]),
        (["seen>2024-05-01"], [4]),
        (["seen>2024-05-01T00:00"], [1, 4]),
        (["seen in 2024-04-30, 2024-05-02"], [2, 4]),
        (["sent=2024-05-01T14:00+02:00"], [0]),
        (["sent>2024-05-01T11:59"], [0]),
        (["sold=TRUE"], [0, 3]),
        (["sold!=true"], [1, 4]),
        (["name~hat", "sold=true", "price<2"], [0]),
        ([], [0, 1, 2, 3, 4]),
    ],
)
def test_conditions_are_held_against_typed_columns(where, rows):
    assert found(where) == rows


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("price>=cheap", "price holds numbers, and 'cheap' is not of them: write such as price>=9.5"),
        ("price=nan", "is not of them"),
        ("count>1_000", "is not of them"),
        ("count in 1,two", "count holds numbers, and 'two' is not of them: write such as count=9.5"),
        ("taken<May", "taken holds dates, and 'May' is not of them: write such as taken<2024-05-01"),
        ("seen<2024-13-01", "seen holds times, and '2024-13-01' is not of them: write such as seen<2024-05-01T18:30"),
        ("seen=2024-05-01T10:00+02:00", "is not of them"),
        ("sent>=0001-01-01T00:00+14:00", "sent holds times, and '0001-01-01T00:00+14:00' is not of them"),
        ("sent<9999-12-31T23:59-14:00", "is not of them"),
        (Condition("name", "in", ("a", None)), "None among them: `is missing` finds what has no value"),
        ("sold=yes", "sold holds true and false, and 'yes' is not of them: write such as sold=true"),
        ("sold>true", "which have no order"),
        ("price~9", "price holds numbers, and ~ looks into texts"),
        ("name>=10", "name holds texts, whose order is not that of numbers"),
        ("seen in 2024-05-01,2024-05-01T10:00", "give days alone, or times alone"),
        ("count=" + "9" * 5000, "is not of them"),
    ],
)
def test_values_that_do_not_fit_are_named(where, said):
    with pytest.raises(FilterError) as found_:
        found(where)
    assert said in str(found_.value) and isinstance(found_.value, QueryError)


def test_an_unknown_column_is_named_with_the_nearest():
    with pytest.raises(UnknownColumnError, match=r"it has no column 'prize' .* Did you mean 'price'\?"):
        found("prize>3")


# -- the types that sources tell -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "type_", "first"),
    [
        (["2024-05-01", None], pa.date32(), date(2024, 5, 1)),
        (["2024-05-01T10:00:00", "2024-05-01 10:00"], pa.timestamp("us"), datetime(2024, 5, 1, 10)),
        (["2024-05-01T10:00:00+02:00", "2024-05-01T10:00Z"], pa.timestamp("us", "UTC"), datetime(2024, 5, 1, 8, tzinfo=UTC)),
        (["2024-05-01T10:00", "2024-05-01T10:00Z"], pa.string(), "2024-05-01T10:00"),
        (["9999-12-31T23:59:59-05:00", "2024-05-01T10:00Z"], pa.string(), "9999-12-31T23:59:59-05:00"),
        (["0001-01-01T00:00:00+01:00", None], pa.string(), "0001-01-01T00:00:00+01:00"),
        (["9999-12-31T23:59:59Z"], pa.timestamp("us", "UTC"), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ([datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))], pa.string(), "0001-01-01 00:00:00+01:00"),
        (["2024-02-31"], pa.string(), "2024-02-31"),
        (["2024-05-01", "unknown"], pa.string(), "2024-05-01"),
        ([date(2024, 5, 1), None], pa.date32(), date(2024, 5, 1)),
        ([datetime(2024, 5, 1), None], pa.timestamp("us"), datetime(2024, 5, 1)),
        ([date(2024, 5, 1), datetime(2024, 5, 1)], pa.string(), "2024-05-01"),
        ([Decimal("1.50"), None], pa.float64(), 1.5),
        (["10", "9"], pa.string(), "10"),
        ([1, 2.5], pa.float64(), 1.0),
        ([1, "x"], pa.string(), "1"),
        ([None, None], pa.string(), None),
    ],
)
def test_a_column_has_the_type_of_its_cells(values, type_, first):
    column = metadata_column("c", values)
    assert column.type == type_ and (first is None or column[0].as_py() == first)


@pytest.mark.parametrize("name", ["split", "caption"])
@pytest.mark.parametrize("values", [[1, None], [True], [date(2024, 5, 1), None], ["2024-05-01"], [1.5, "x"], [None]])
def test_splits_and_captions_are_texts(name, values):
    column = metadata_column(name, values)
    assert column.type == pa.string() and column.to_pylist() == [None if value is None else str(value) for value in values]


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (["10", None, "-3"], pa.int64()),
        (["10", "2.50"], pa.float64()),
        (["007", "8"], pa.string()),
        (["1e3"], pa.string()),
        (["1,5"], pa.string()),
        (["12345678901234567890"], pa.string()),
        (["2024-05-01"], pa.date32()),
        ([None], pa.string()),
    ],
)
def test_numbers_of_a_source_of_texts_are_told(values, type_):
    assert metadata_column("c", values, plain=True).type == type_
    assert metadata_column("split", values, plain=True).type == pa.string()


ROWS = [("a", 9.5, "2024-04-30", "red", 3), ("b", 10.0, "2024-05-01", "blue", 1), ("c", 120.0, "2024-06-01", "green", 2)]
NAMES = ("image", "price", "taken", "color", "count")


def products(folder: Path, ending: str) -> Path:
    """A table of three images and, in its last row, one without any value."""
    write_images(folder, range(4))
    for name, old in zip("abcd", ("00.png", "02.png", "deep/01.png", "deep/03.png")):
        (folder / old).rename(folder / f"{name}.png")
    rows = [dict(zip(NAMES, (f"{image}.png", *others))) for image, *others in ROWS]
    table = folder / f"t.{ending}"
    if ending == "parquet":
        typed_rows = [row | {"taken": date.fromisoformat(row["taken"]), "price": Decimal(str(row["price"]))} for row in rows]
        pq.write_table(pa.Table.from_pylist([*typed_rows, {"image": "d.png"}]), table)
    elif ending == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "d.png"}]))
    else:
        lines = [",".join(NAMES), *(",".join(map(str, row.values())) for row in rows), "d.png,,,,"]
        table.write_text("\n".join(lines) + "\n")
    return table


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_is_filtered_and_sorted_by_its_own_types(run, tmp_path, capsys, ending):
    out = str(tmp_path / "out")
    assert main(["index", str(products(tmp_path, ending)), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    searcher = Searcher(out)
    kinds = {name: str(type_) for name, type_ in searcher.filter_columns.items()}
    assert (kinds["price"], kinds["taken"], kinds["count"], kinds["color"]) == ("double", "date32[day]", "int64", "string")

    def ids(where, **more):
        return [r.id for r in searcher.search("red circle", where=where, **more)]

    assert sorted(ids("price>=10")) == ["b.png", "c.png"] and ids(["price>9.5", "taken<2024-05-31"]) == ["b.png"]
    assert sorted(ids("color in red,green")) == ["a.png", "c.png"] and ids("color is missing") == ["d.png"]
    assert ids({"taken": date(2024, 5, 1)}) == ids({"taken": "2024-05-01"}) == ["b.png"] and ids("width>10000") == []
    assert ids(None, sort="price") == ["a.png", "b.png", "c.png", "d.png"], "without a value: last"
    assert ids(None, sort="-taken") == ["c.png", "b.png", "a.png", "d.png"] and ids(None, sort="color")[0] == "b.png"
    found = searcher.search("red circle", where="color=blue")[0]
    assert found.metadata["taken"] == date(2024, 5, 1) and found.to_dict()["metadata"]["taken"] == "2024-05-01"
    capsys.readouterr()
    assert main(["search", out, "red circle", "--sort=-price", "--where", "taken>=2024-05-01", "price<1000", "--json"]) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)["results"]] == ["c.png", "b.png"]
    client = client_of(tmp_path / "out")
    told = {column["name"]: column for column in client.get("/indexes").json()["indexes"][0]["columns"]}
    assert (told["price"]["kind"], told["price"]["min"], told["price"]["max"]) == ("number", 9.5, 120.0)
    assert (told["taken"]["kind"], told["taken"]["min"], told["taken"]["max"]) == ("date", "2024-04-30", "2024-06-01")
    assert told["color"]["kind"] == "text" and sorted(told["color"]["values"]) == [["blue", 1], ["green", 1], ["red", 1]]
    asked = {"text": "red circle", "where": ["price>=10", "price<=200"], "sort": "-taken"}
    for answer in (client.get("/search", params=asked), client.post("/search", json=asked)):
        assert [r["id"] for r in answer.json()["results"]] == ["c.png", "b.png"]
        assert answer.json()["results"][0]["metadata"]["taken"] == "2024-06-01"
    wrong = client.get("/search", params={"text": "x", "where": "prize>3"}).json()
    assert wrong["error"] == "UnknownColumn" and "Did you mean 'price'?" in wrong["message"]


def test_columns_that_change_their_type_become_text(run, tmp_path):
    table, out = products(tmp_path, "csv"), str(tmp_path / "out")
    index.create(str(table), str(run), out, workers=0)
    more = tmp_path / "more"
    write_images(more, [0])
    (more / "t.csv").write_text("image,price,taken\n00.png,on request,some day\n")
    index.add(out, str(more / "t.csv"), workers=0)
    searcher = Searcher(out)
    assert [str(searcher.filter_columns[name]) for name in ("price", "taken", "count")] == ["string", "string", "int64"]
    assert [r.id for r in searcher.search("x", where="price=on request")] == ["00.png"]
    assert [r.id for r in searcher.search("x", where="taken=2024-05-01")] == ["b.png"]


def test_the_rows_of_a_filter_are_kept_and_found_again_however_it_is_written(run, tmp_path, monkeypatch):
    index.create(str(products(tmp_path, "csv")), str(run), str(tmp_path / "out"), workers=0)
    searcher = Searcher(str(tmp_path / "out"))
    rows = searcher.matching("price>=10")
    assert searcher.matching(["price >= 10.0"]) is rows and searcher.matching(["price>=10", "price>=10"]) is rows
    assert searcher.matching(["price>10"]).tolist() != rows.tolist(), "another operator is another filter"
    assert searcher.matching({"count": 1}).tolist() == searcher.matching("count=1").tolist()
    both = searcher.matching(["price>=10", "color=blue"])
    assert searcher.matching(["color=blue", "price>=10"]) is both
    for price in range(CACHED_FILTERS):
        searcher.matching(f"price>{price + 100}")
    assert len(searcher._filters) == CACHED_FILTERS and searcher.matching("price>=10").tolist() == rows.tolist()

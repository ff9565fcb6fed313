"""Tables: whatever the format, a cell is what it says, or its row is left out and named; nothing changes in silence."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.errors import SampleError, SearchIndexError, SourceError
from mmref.retrieval.images import TableColumns, list_images
from mmref.shards.sources.table import TableSource
from mmref.storage.tables import read_table

HEADER = "image,object_id,caption\n"


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def cells(place: str, column: str = "caption") -> list[Any]:
    """Of every row its text, or the reason why there is none."""
    found: list[Any] = []
    for row in read_table(place).rows([column]):
        try:
            found.append(row.text(column))
        except SampleError as error:
            found.append(error)
    return found


def taken(place: str, **options: Any) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """What `shards build` takes of a table: image -> object and captions; and what it lists. `index` agrees."""
    source = TableSource(place, **options)
    found = {i.image_id: (o.object_id, i.captions) for o in source.objects() for i in o.images}
    listing = list_images(place)
    rows = listing.items.to_pylist()
    assert {r["id"]: r["object_id"] for r in rows if r["object_id"]} == {i: o for i, (o, _) in found.items()}
    lacking = [line for line in source.skipped if not line.endswith("no object_id")]  # an index does not need one
    assert [f"{what}: {reason}" for what, reason in listing.skipped] == lacking
    return found, source.skipped


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_csv_that_are_malformed_are_listed(tmp_path: Path) -> None:
    text = HEADER + (
        "a.png,1,a man in a red jacket, blue jeans\n"  # row 2
        "\n"
        ",,\n"
        "b.png,2,a woman,,\n"  # row 5: empty cells more
        'c.png,3,"a 5" pan"\n'  # row 6
        "d.png,4\n"  # row 7: a row that ends early
        '"e.png",5,"said ""hi"",\nand left"\n'
        "f.png,\n"  # row 9
        "g.png,7,nan\n"
        ' ,8,"x"\n'
    )
    found, skipped = taken(write(tmp_path / "t.csv", text))
    assert found == {
        "b.png": ("2", ["a woman"]), "d.png": ("4", []), "e.png": ("5", ['said "hi",\nand left']), "g.png": ("7", ["nan"]),
    }  # fmt: skip
    assert [line.partition(":")[0] for line in skipped] == ["row 2", "row 6", "row 9", "row 11"]
    assert "4 cells, but 3 columns" in skipped[0] and "quotation mark" in skipped[1]
    assert skipped[2:] == ["row 9: no object_id", "row 11: no image"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_encodings(tmp_path: Path, end: str, encoding: str) -> None:
    text = (HEADER + "a.png,1,Größe\nb.png,2,€\n").replace("\n", end)
    found, skipped = taken(write(tmp_path / "t.csv", text.encode(encoding)))
    assert (found, skipped) == ({"a.png": ("1", ["Größe"]), "b.png": ("2", ["€"])}, [])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", HEADER + 'a.png,1,"12 inch pan\n' + "b.png,2,a thing\n" * 9000, "row 2: from line 2 to line 9002"),
        ("t.csv", HEADER + 'a.png,1,x\n\nb.png,2,"12 inch\nc.png,3,"y"\n', "row 4: from line 4 to line 5"),
        ("t.csv", 'image,"object_id\n', "row 1, which names the columns"),
        ("t.csv", "image;object_id;caption\na.png;1;x\n", "one column, called 'image;object_id;caption'.*semicolons"),
        ("t.csv", "image\tobject_id\na.png\t1\n", "tabs.*call it .tsv"),
        ("t.csv", "image|object_id\n", "vertical bars"),
        ("t.tsv", HEADER, "commas, those of a .tsv are by tabs"),
        ("t.csv", "image,object_id,caption,caption\n", "2 columns called 'caption'"),
        ("t.csv", "\n\n", "is empty"),
        ("t.jsonl", '{"image": "a.png"},\n', "line 1 is not JSON.*ends without a comma"),
        ("t.jsonl", '[\n  {"image": "a.png"}\n]', "line 1 is not JSON.*lines=True"),
        ("t.jsonl", '[{"image": "a.png"},\n{"image": "b.png"}]', "line 1 is not JSON.*lines=True"),
        ("t.jsonl", '[{"image": "a.png"}]', "expected an object {...}, found list.*lines=True"),
        ("t.jsonl", '{\n"image": "a.png"\n}', "line 1 is not JSON.*lines=True"),
        ("t.jsonl", '{"image": "a.png"}\n3\n', "line 2: expected an object {...}, found int"),
        ("t.jsonl", "[" * 100000, "line 1 is not JSON"),
        ("t.csv", b"PK\3\4", "spreadsheet"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    place = write(tmp_path / name, text)
    with pytest.raises(SourceError, match=f"{name}.*{said}"):
        list(TableSource(place).objects())
    with pytest.raises(SourceError, match=f"{name}.*{said}"):
        list_images(place)


def test_a_long_cell_is_none_that_is_not_closed(tmp_path: Path) -> None:
    place = write(tmp_path / "t.csv", f'image,object_id,caption,page\na.png,1,x,"{"<p>" * 100_000}"\n')
    assert taken(place) == ({"a.png": ("1", ["x"])}, [])


def test_columns_without_a_name(tmp_path: Path) -> None:
    """The numbers that pandas writes first, and the empty columns of a spreadsheet; text in those is a cell too many."""
    place = write(tmp_path / "t.csv", ", image ,object_id,caption,,\n0,a.png,1,x,,\n1,b.png,2,a mug, blue,\n")
    found, skipped = taken(place)
    assert found == {"a.png": ("1", ["x"])} and skipped[0].startswith("row 3: 6 cells, but 4 columns")
    assert list_images(place).items.column_names[-1] == "caption"


@pytest.mark.parametrize("first", ["sep=,", "\ufeffsep=,", '"sep=,"', "\nsep=,\r", "sep="])
def test_a_first_line_for_excel_names_no_columns(tmp_path: Path, first: str) -> None:
    place = write(tmp_path / "t.csv", f'{first}\n{HEADER}a.png,1,x\nb.png,2,"a ""b"""\nc.png,3,a, b\n')
    found, skipped = taken(place)
    assert found == {"a.png": ("1", ["x"]), "b.png": ("2", ['a "b"'])} and len(skipped) == 1
    assert ": 4 cells, but 3 columns" in skipped[0]


# -- cells -----------------------------------------------------------------------------------------------------------

TEXTS: list[tuple[Any, str | None]] = [
    ("a", "a"), (" \u00a0a b\u3000\n", "a b"), ("", ""), (" \u00a0\t", ""), ("\ufeffa", "a"), ("\u200b\ufeff", ""),
    ("nan", "nan"), ("NULL", "NULL"), (None, ""), (math.nan, ""), (7, "7"), (10**30, "1" + "0" * 30), (2.0, "2"),
    (-3.0, "-3"), (0.1, "0.1"), (2.0**53, str(2**53)),
    (2.0**54, None), (math.inf, None), (True, None), ({"a": 1}, None), (["a"], None), ("a\0b", None), ("half \ud83d", None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), TEXTS)
def test_what_a_cell_of_json_says(tmp_path: Path, value: Any, text: str | None) -> None:
    (found,) = cells(write(tmp_path / "t.jsonl", json.dumps({"caption": value})))
    assert found == text if text is not None else isinstance(found, SampleError) and "caption" in str(found)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([1.0, math.nan, 0.5, None]), ["1", "", "0.5", ""]),
        (pa.array([1.5, 2.0, 0.1, math.nan, None], pa.float32()), ["1.5", "2", "0.1", "", ""]),
        (pa.array([7, None], pa.uint64()), ["7", ""]),
        (pa.array(["a", None]).dictionary_encode(), ["a", ""]),
        (pa.array(["a", ""], pa.large_string()), ["a", ""]),
        (pa.array([b"caf\xc3\xa9", b"\xff\xd8"], pa.binary()), ["café", None]),
        (pa.array([Decimal("2.50")]), ["2.50"]),
        (pa.array([datetime.date(2026, 1, 2)]), ["2026-01-02"]),
        (pa.array([datetime.datetime(2026, 1, 2, 3, 4)]), ["2026-01-02 03:04:00"]),
        (pa.array([datetime.timedelta(1)]), [None]),
        (pa.array([True, None]), [None, ""]),
        (pa.array([{"bytes": b"\xff", "path": "a.png"}]), [None]),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [None]),
        (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), [str(uuid.UUID(int=1))]),
        (pa.array([1, 10**12], pa.timestamp("s")), ["1970-01-01 00:00:01", None]),  # the second is beyond the year 9999
        (pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers()), ["ok", None]),
    ],
)
def test_what_a_cell_of_parquet_says(tmp_path: Path, values: pa.Array, texts: list[str | None]) -> None:
    pq.write_table(pa.table({"a.b": values, "caption": values}), tmp_path / "t.parquet")
    for column in ("caption", "a.b"):
        found = cells(str(tmp_path / "t.parquet"), column)
        assert [None if isinstance(each, SampleError) else each for each in found] == texts
        assert all(column in str(each) for each in found if isinstance(each, SampleError))


def test_captions_are_texts_or_lists_of_them(tmp_path: Path) -> None:
    values: list[Any] = [
        ["one", None, math.nan, " ", "two"],
        "one",
        5,
        [],
        None,
        [["one"]],
        [{"a": 1}],
        [True],
        math.inf,
    ]
    lines = [json.dumps({"image": f"{i}.png", "object_id": i, "captions": value}) for i, value in enumerate(values)]
    found, skipped = taken(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert [found[f"{i}.png"] for i in range(5)] == [
        ("0", ["one", "two"]), ("1", ["one"]), ("2", ["5"]), ("3", []), ("4", [])
    ]  # fmt: skip
    assert [line.partition(": captions ")[0] for line in skipped] == ["row 6", "row 7", "row 8", "row 9"]
    column = pa.array([["one", None], None], pa.list_(pa.large_string()))
    pq.write_table(pa.table({"image": ["a", "b"], "object_id": [1, 2], "captions": column}), tmp_path / "t.parquet")
    assert taken(str(tmp_path / "t.parquet")) == ({"a": ("1", ["one"]), "b": ("2", [])}, [])


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_missing_cells_of_pandas_are_missing(tmp_path: Path, ending: str) -> None:
    """A column of numbers with a missing one is of floats to pandas: its text in a CSV is `2.0`, which a reader cannot know."""
    frame = pd.DataFrame({
        "image": ["a.png", "b.png", None, "d.png"], "object_id": [1, 2, 3, None], "caption": ["one", None, "three", "four"],
        "price": [1.5, math.nan, 2.5, 3.5],
    })  # fmt: skip
    path = tmp_path / f"t.{ending}"
    if ending in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    found, skipped = taken(str(path))
    ids = ("1.0", "2.0") if ending in ("csv", "tsv") else ("1", "2")
    assert found == {"a.png": (ids[0], ["one"]), "b.png": (ids[1], [])}
    first = 2 if ending in ("csv", "tsv") else 1
    assert skipped == [f"row {first + 2}: no image", f"row {first + 3}: no object_id"]


def test_further_columns_are_values_of_json(tmp_path: Path) -> None:
    values = [1, math.nan, math.inf, {"a": [math.nan, 1]}, "half \ud83d", None, 2**70]
    lines = [json.dumps({"image": f"{i}", "object_id": i, "caption": "x", "more": v}) for i, v in enumerate(values)]
    source = TableSource(write(tmp_path / "t.jsonl", "\n".join(lines)), keep=["more"])
    kept = {image.image_id: image.extra["more"] for item in source.objects() for image in item.images}
    assert kept == {"0": 1, "1": None, "3": {"a": [None, 1]}, "5": None, "6": 2**70}
    assert [line[:11] for line in source.skipped] == ["row 3: more", "row 5: more"]
    listing = list_images(source.path)
    assert [what for what, _ in listing.skipped] == ["row 5"]
    assert listing.cells_left == {"more": 1}, "infinity costs no image"
    assert listing.items["more"].to_pylist() == ["1", *[None] * 4, str(2**70)], "too large for a column of numbers"
    frame = pd.DataFrame({"image": ["a"], "object_id": ["1"], "caption": ["x"], "made": [pd.Timestamp("2026-01-02")]})
    frame["price"], frame["tags"] = [Decimal("2.50")], [["new"]]
    frame.to_parquet(tmp_path / "t.parquet")
    (row,) = list_images(str(tmp_path / "t.parquet")).items.to_pylist()
    assert (row["made"], row["price"], "tags" in row) == (pd.Timestamp("2026-01-02"), 2.5, False)


# -- rows and columns ------------------------------------------------------------------------------------------------


def test_a_key_that_a_line_has_twice(tmp_path: Path) -> None:
    lines = ['{"image": "a", "object_id": 1, "caption": "one", "caption": "two"}', '{"image": "b", "object_id": 2}']
    found, skipped = taken(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert found == {"b": ("2", [])} and skipped == ["row 1: 'caption' is given twice"]


def test_a_parquet_file_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [f"{i}.png" for i in range(9)]}), path)
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:3], b"", b"\0" * 40 + whole[40:]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"t\.parquet"):
            cells(str(path), "image")


def test_an_image_of_two_objects(tmp_path: Path) -> None:
    """A set takes neither; an index keeps the first and lists the other."""
    place = write(tmp_path / "t.csv", HEADER + "a.png,,one\na.png,1,two\na.png,2,three\n")
    with pytest.raises(SourceError, match=r"row 4: image 'a.png' belongs to the objects '1' and '2'"):
        TableSource(place).objects()
    listing = list_images(place)
    assert listing.items.to_pylist()[0]["object_id"] == "1" and sorted(listing.captions) == ["one", "two"]
    assert listing.skipped == [("row 4", "image 'a.png' belongs to the object '1' in an earlier row, here to '2'")]


def test_columns_that_are_named_and_not_there(tmp_path: Path) -> None:
    place = write(tmp_path / "t.csv", HEADER.replace("object_id", "sku") + "a.png,1,x\n")
    with pytest.raises(SourceError, match=r"no column 'object_id'.*--object-id"):
        TableSource(place).objects()
    assert list_images(place).items["object_id"].to_pylist() == [None], "an index needs none"
    with pytest.raises(SearchIndexError, match=r"no column 'sk'.*Did you mean 'sku'.*--object-column"):
        list_images(place, columns=TableColumns(object_id="sk"))
    with pytest.raises(SearchIndexError, match=r"holds no image .*1 were left out, the first: row 2: no image"):
        list_images(write(tmp_path / "none.csv", HEADER + ",1,x\n"))


def test_a_row_without_a_split_is_listed(tmp_path: Path) -> None:
    place = write(tmp_path / "t.csv", "image,object_id,caption,split\na.png,1,x,Train\nb.png,2,y,\n")
    source = TableSource(place)
    assert [(o.object_id, o.split) for o in source.objects()] == [("1", "train")]
    assert source.skipped == ["row 3: no split"]


def test_images_are_where_the_table_or_the_home_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", HEADER + "a.png,1,x\n~/b.png,2,y\nhttp://c.d/e f.png,3,z\n")
    for root, found in ((None, tmp_path), ("~/pics", tmp_path / "home" / "pics"), ("pics", tmp_path / "pics")):
        columns = TableColumns(image_root=root, allow_outside=True)
        paths = list_images("t.csv", columns=columns).items["path"].to_pylist()
        assert paths == [f"{found}/a.png", f"{tmp_path}/home/b.png", "http://c.d/e f.png"]
        assert TableSource("t.csv", image_root=root).image_root == str(found)

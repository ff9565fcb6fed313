"""Images in rows of Parquet files: in order, in any order, by many threads; of files that change, are damaged or elsewhere."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.errors import SampleError
from mmref.storage import image_places
from mmref.storage.image_places import IN_ROW, Place, file_of, read_place, row_place

ROWS = 300


def value(number: int, version: int = 0) -> bytes:
    return bytes([version, number % 256]) * (50 + number % 7)


@pytest.fixture(params=["bytes", "mappings"])
def file(request, tmp_path) -> str:
    path = str(tmp_path / "a b.parquet")
    write(path, request.param)
    return path


def write(path: str, kind: str = "bytes", version: int = 0) -> None:
    values = [None if i == 7 else value(i, version) for i in range(ROWS)]
    if kind == "mappings":
        told = [None if v is None else {"bytes": v, "path": f"{i}.png"} for i, v in enumerate(values)]
        column = pa.array(told, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    else:
        column = pa.array(values, pa.binary())
    # Groups of 70 rows and pages of about 16: more than one of both.
    pq.write_table(pa.table({"n": range(ROWS), "the image": column}), path, row_group_size=70, data_page_size=1000)


def read(path: str, row: int) -> bytes:
    return read_place(row_place(path, "the image", row))


def test_rows_in_order_in_any_order_and_by_threads(file):
    order = [i for i in range(ROWS) if i != 7]
    assert [read(file, i) for i in order] == [value(i) for i in order]
    random.Random(0).shuffle(order)
    assert [read(file, i) for i in order] == [value(i) for i in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: read(file, i), order)) == [value(i) for i in order]


def test_in_order_each_row_is_unpacked_once(file, monkeypatch):
    asked = []
    original = image_places.parquet_batches
    monkeypatch.setattr(image_places, "parquet_batches", lambda *given: asked.append(given[3]) or original(*given))
    for i in range(ROWS):
        if i != 7:
            read(file, i)
    assert asked == [[0], [1], [2], [3], [4]]


def test_what_is_not_there_is_named(file, tmp_path):
    for row, words in ((7, "row 8: no image in the column 'the image'"), (ROWS, "has 300 rows, and no row 301")):
        with pytest.raises(SampleError, match=words):
            read(file, row)
    with pytest.raises(SampleError, match="has no column 'gone' any more"):
        read_place(row_place(file, "gone", 0))
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "none.parquet"), 0)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(SampleError, match="is no Parquet file"):
        read(str(tmp_path / "text.parquet"), 0)
    with pytest.raises(SampleError, match="names no column"):
        read_place(Place(file, 0, IN_ROW))


def test_a_file_written_anew_is_read_anew(file, tmp_path):
    assert read(file, 3) == value(3)
    write(file, "bytes", version=1)
    assert read(file, 3) == value(3, 1)


def test_damage_costs_the_rows_near_it_alone(tmp_path):
    path = tmp_path / "d.parquet"
    write(str(path))
    data = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    with pytest.raises(SampleError, match=r"d\.parquet::the image is damaged near row 71"):
        read(str(path), 75)
    assert read(str(path), 5) == value(5) and read(str(path), 200) == value(200)


def test_rows_behind_a_url(file):
    fs = fsspec.filesystem("memory")
    fs.pipe("/rows/x.parquet", Path(file).read_bytes())
    assert [read("memory://rows/x.parquet", i) for i in (0, 299, 70)] == [value(0), value(299), value(70)]


def test_the_file_of_a_place():
    assert file_of(row_place("/a/b.parquet", "x/y::z", 3).path) == "/a/b.parquet"
    assert file_of("/a/b::c.jpg") == "/a/b::c.jpg" and file_of("zip://a.jpg::/b.zip") == "zip://a.jpg::/b.zip"

"""What is read together by array operations is what is read row by row, whatever a table holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmref.errors import SampleError, SourceError
from mmref.storage import plain_csv, tables, texts
from mmref.storage.cells import Batch
from mmref.storage.tables import read_table

COLUMNS = ("image", "object_id", "caption")
CELLS = st.sampled_from([
    "a.png", "007", "a b", "", " ", '"x, y"', '"a ""b"" c"', '""', '"two\nlines"', '"two\r\nlines"', 'a 5" pan', '"a" b', '"open',
    "Größe", "\u00a0x\u3000", "\ufeff", "\u200b", "a\0b", "x,y", "nan", '"x"\r', "\r", '"', '"""', '""""', "\x1f", "'", "\u2028",
])  # fmt: skip
ROWS = st.lists(st.lists(CELLS, min_size=0, max_size=4).map(",".join), max_size=12)


def told(place: str) -> Any:
    """All rows with what can be had of each, or the error that ends the table."""
    found = []
    try:
        for row in read_table(place).rows(COLUMNS):
            try:
                found.append((row.number, [row.text(name) for name in COLUMNS], row.texts("caption")))
            except SampleError as error:
                found.append((row.number, str(error)))
    except SourceError as error:
        return str(error)
    return found


def by_batch(place: str) -> Any:
    """As `told`, of the columns of batches."""
    found: list[Any] = []
    try:
        for batch in read_table(place).batches(COLUMNS):
            texts_of, faults = zip(*(batch.texts(name) for name in COLUMNS), strict=True)
            captions, counts, wrong = batch.text_lists("caption")
            ends = counts.cumsum()
            for i, number in enumerate(batch.numbers.tolist()):
                why = next((f[i] for f in (batch.faults, *faults, wrong) if i in f), None)
                said = captions.to_pylist()[ends[i] - counts[i] : ends[i]]
                found.append((number, [t[i].as_py() for t in texts_of], said) if why is None else (number, why))
    except SourceError as error:
        return str(error)
    return found


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]), block=st.sampled_from([16, 64, 1 << 20]), last=st.booleans())
@example(rows=["a,b,c"] * 9 + ['a,b,"c'], end="\n", block=16, last=False)
@example(rows=["a,b,c", "a,b", "", "a,b,c"], end="\r\n", block=16, last=True)
def test_a_csv_is_what_it_is_row_by_row(tmp_path_factory: Any, rows: list[str], end: str, block: int, last: bool) -> None:
    place = tmp_path_factory.mktemp("t") / "t.csv"
    place.write_bytes(end.join(["image,object_id,caption", *rows, *([""] if last else [])]).encode())
    with mock.patch.object(plain_csv.Piece, "is_quoted_plainly", return_value=False):
        expected = told(str(place))
    with mock.patch.object(tables, "line_blocks", lambda place, wrong, size=0: texts.line_blocks(place, wrong, block)):
        assert told(str(place)) == expected
        assert by_batch(str(place)) == expected


VALUES = st.sampled_from(
    ["a", "007", " x ", "", None, 7, 2.0, 0.5, True, ["one", None, " two"], [], {"a": 1}, "2026-01-02", 2**70]
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from([*COLUMNS, "other"]), VALUES), min_size=1, max_size=10),
    block=st.sampled_from([16, 64, 1 << 20]),
    odd=st.sampled_from(
        ["", "\n", "\r\n", '{"image": "a", "image": "b"}\n', '{"image": 1}{"image": 2}\n', '{"image": "\\ud83d"}\n']
    ),
)
def test_lines_of_json_are_what_they_are_row_by_row(tmp_path_factory: Any, rows: list[dict], block: int, odd: str) -> None:
    place = tmp_path_factory.mktemp("t") / "t.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows) + odd)
    with (
        mock.patch.object(tables, "plain_columns", return_value=None),
        mock.patch.object(tables, "holds_no_other", return_value=False),
    ):
        expected, names = told(str(place)), list(_names(str(place)))
    with mock.patch.object(tables, "line_blocks", lambda place, wrong, size=0: texts.line_blocks(place, wrong, block)):
        assert list(_names(str(place))) == names
        assert told(str(place)) == expected
        assert by_batch(str(place)) == expected


def _names(place: str) -> list[str]:
    try:
        return read_table(place).names
    except SourceError as error:
        return [str(error)]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_common_tables_are_read_together(tmp_path: Path, ending: str) -> None:
    rows = [(f"{i}.png", f"{i:07}", f'He said "{i}", \n twice') for i in range(3000)]
    place = tmp_path / f"t.{ending}"
    if ending == "csv":
        cells = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
        place.write_text("\n".join(["image,object_id,caption", *cells]))
    else:
        place.write_text("\n".join(json.dumps(dict(zip(COLUMNS, row))) for row in rows))
    with mock.patch.object(Batch, "of", side_effect=AssertionError("a row alone")):
        found = list(itertools.chain.from_iterable(batch.rows() for batch in read_table(str(place)).batches(COLUMNS)))
    assert [tuple(row.cells.values()) for row in found] == rows
    assert [row.number for row in found] == list(range(1 + (ending == "csv"), 3001 + (ending == "csv")))


def test_the_line_of_a_wrong_byte_counts_all_blocks(tmp_path: Path) -> None:
    place = tmp_path / "t.csv"
    place.write_bytes(b"image,object_id,caption\r\n" + b"a.png,1,x\r\n" * 500 + "b.png,2,Käse\r\n".encode("latin-1"))
    with pytest.raises(SourceError, match="in line 502 the byte 0xe4"):
        list(texts.line_blocks(str(place), SourceError, 100))

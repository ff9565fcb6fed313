"""Which files one text names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmref.storage.files import folder_of, matching_files

ENDINGS = (".parquet",)
FILES = ("spark.parquet/part-0.snappy.parquet", "spark.parquet/part-1.snappy.parquet")  # as Spark and Dask write a table
OTHERS = ("one.parquet", "spark.parquet/_SUCCESS", "spark.parquet/.part-0.snappy.parquet.crc", "note.txt")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = tmp_path / "tables"
    for name in (*FILES, *OTHERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    if request.param == "local":
        return str(root)
    import fsspec

    bucket = request.getfixturevalue("s3_bucket")
    fsspec.filesystem("s3").put(str(root), f"{bucket}/{tmp_path.name}", recursive=True)
    return f"{bucket}/{tmp_path.name}"


def named(place: str, given: str) -> list[str]:
    return [path.removeprefix(f"{place}/") for path in matching_files(f"{place}/{given}", ENDINGS)]


def test_a_folder_whose_name_ends_as_a_files_does_is_a_folder(place: str) -> None:
    assert named(place, "spark.parquet") == list(FILES) == named(place, "spark.parquet/")
    assert folder_of(f"{place}/spark.parquet", ENDINGS) == f"{place}/spark.parquet"
    assert named(place, "*.parquet") == ["one.parquet", *FILES], "and so is one that a pattern matches"
    assert named(place, "spark.*/*.parquet") == list(FILES)


def test_a_file_and_what_is_not_there(place: str) -> None:
    assert named(place, "one.parquet") == ["one.parquet"] and folder_of(f"{place}/one.parquet", ENDINGS) == place
    assert named(place, "note.txt") == [] == named(place, "no*.parquet")
    assert matching_files(place, ENDINGS) == [f"{place}/{name}" for name in ("one.parquet", *FILES)]

"""Arrays that are written as a stream: the files that NumPy writes, and a full disk that is told by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from mmref.errors import StorageError
from mmref.storage.array_file import ArrayFile, RowFile, save_array


@pytest.mark.parametrize("array", [np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4), np.zeros((0, 2), np.int32)])
def test_files_are_those_of_numpy(tmp_path, array):
    with ArrayFile(tmp_path / "a.npy", array.shape, array.dtype) as file:
        file.write(array[:1].astype(np.float64))
        file.write(array[1:])
    save_array(tmp_path / "b.npy", array)
    expected = io.BytesIO()
    np.save(expected, array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes() == expected.getvalue()


def test_a_full_disk_is_told_with_the_bytes_needed():
    """/dev/full is a disk without room."""
    rows = np.zeros((1000, 8), np.float32)
    with pytest.raises(StorageError, match=r"no space left for /dev/full: 32,000 bytes are needed, [\d,]+ bytes are free"):
        save_array(Path("/dev/full"), rows)
    with (
        pytest.raises(StorageError, match="32,000 bytes"),
        ArrayFile(Path("/dev/full"), rows.shape, rows.dtype) as file,
    ):
        file.write(rows[:1])  # fits in the buffer: found at the end


def test_rows_of_a_file_are_those_of_the_array_and_nothing_stays_mapped(tmp_path):
    for dtype in (np.float16, np.float32, np.int32):
        path, array = tmp_path / "a.npy", np.arange(1200).reshape(300, 4).astype(dtype)
        np.save(path, array)
        rows = RowFile(path, np.load(path, mmap_mode="r"))
        path.unlink()  # behind a reader's back
        for at in (np.array([299, 0, 7, 7]), np.array([[3, 2], [1, 0]]), np.empty(0, np.int64)):
            found = rows[at]
            assert found.dtype == dtype and len(rows) == 300
            np.testing.assert_array_equal(found, array[at])

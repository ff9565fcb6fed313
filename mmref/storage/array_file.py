"""Writing .npy files as a stream, first row to last, and reading few rows of large ones.

A file that is mapped into memory before its space is set aside is filled by the kernel, which can tell of a full disk only by
ending the process (SIGBUS). So arrays are written, and mapped only to be read.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.storage.disk import told_when_full


class ArrayFile:
    """A .npy file of a known shape, written by rows in a `with` statement; whole and on the disk when that ends.

    Raises:
        StorageError: no space is left for it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self._file = open(path, "wb")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with told_when_full(self.path, self.nbytes), self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        with told_when_full(self.path, self.nbytes):
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as a .npy file; `numpy.save` does not say what a write failed of."""
    with ArrayFile(path, array.shape, array.dtype) as file:
        file.write(array)


class RowFile:
    """Rows of a .npy file that are read one by one, for few rows of a large file. Thread-safe.

    Of a mapped file a process comes to hold what it reads, with up to 2 MB around each row, until somebody else needs the memory:
    rows from here and there soon add up to the whole file. What is read so stays in the system's cache alone, and of a disk
    no more is read than the row.

    Args:
        mapped: the same file as NumPy maps it, of two dimensions.
    """

    def __init__(self, path: Path, mapped: np.memmap[Any, Any]) -> None:
        self.shape, self.dtype, self._offset = mapped.shape, mapped.dtype, mapped.offset
        self._handle = os.open(path, os.O_RDONLY)
        # Not `__del__`: where Python ends before its objects do, that finds no `os` any more, and complains.
        weakref.finalize(self, os.close, self._handle).atexit = False
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (any shape) of 0 and more: rows.shape + (width,)."""
        size, handle = self.shape[1] * self.dtype.itemsize, self._handle
        data = b"".join([os.pread(handle, size, start) for start in (rows.reshape(-1) * size + self._offset).tolist()])
        return np.frombuffer(data, self.dtype).reshape(*rows.shape, self.shape[1])


def let_go(arrays: Iterable[NDArray[Any]]) -> None:
    """Give up what this process holds of mapped arrays: it is mapped again when it is read again, also by another thread."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)

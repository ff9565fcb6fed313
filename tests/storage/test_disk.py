"""Full disks: told by name, whoever meets them."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from support.disks import files_below

from mmref.errors import ModelError, StorageError
from mmref.storage.disk import told_when_full


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_each_way_to_be_full_is_told(tmp_path, code):
    said = f"no space left for {tmp_path}/not/yet: 1,000 bytes are needed, .*{os.strerror(code)}"
    with pytest.raises(StorageError, match=said), told_when_full(tmp_path / "not" / "yet", 1000):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("library", ["safetensors", "faiss", "shutil", "parquet"])
def test_libraries_with_errors_of_their_own_are_understood(tmp_path, library):
    import faiss

    vectors = faiss.IndexFlatIP(256)
    vectors.add(np.ones((5000, 256), np.float32))
    random = np.random.default_rng(0).integers(0, 2**60, 50_000)
    write = {
        "safetensors": lambda: save_file({"x": torch.ones(100_000)}, tmp_path / "x"),
        "faiss": lambda: faiss.write_index(vectors, str(tmp_path / "x")),
        "shutil": lambda: shutil.copytree(os.path.dirname(np.__file__), tmp_path / "x"),
        "parquet": lambda: pq.write_table(pa.table({"x": random}), tmp_path / "x"),
    }[library]
    with pytest.raises(StorageError, match="no space left"), told_when_full(tmp_path), files_below(10_000):
        write()


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("full"), ModelError("No space left on device")):
        with pytest.raises(type(error)), told_when_full(tmp_path):
            raise error

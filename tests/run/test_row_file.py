"""References in files, read a slice at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmref.evaluate.refinement import ReferenceSpace
from mmref.run import row_file
from mmref.run.checkpoints import load_references
from mmref.run.row_file import StoredReferences, are_set, blocks, pack_ids
from mmref.storage.tensor_file import write_tensors

SIZES = {"three": (4, 0, 7), "one": (11,)}


@pytest.fixture(params=[(name, dtype) for name in SIZES for dtype in (torch.float32, torch.bfloat16)], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], np.ndarray]:
    """A folder with files of references, its meta.json, and the references (11, 2, 3), of which objects 2 and 9 have none."""
    sizes, dtype = SIZES[request.param[0]], request.param[1]
    rows = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[[2, 9]] = 0
    rows[5, 1] = 0
    first, files = 0, {}
    for rank, size in enumerate(sizes):
        ids = pack_ids(pa.array([f"o{i}" for i in range(first, first + size)], pa.large_string()))
        name = f"references-{rank}.safetensors"
        with open(tmp_path / name, "wb") as file:
            write_tensors(file, {"rows": rows[first : first + size].contiguous(), **ids}, {"first": str(first)})
        files[name], first = {}, first + size
    return tmp_path, {"files": files}, rows.float().numpy()


def test_slices_are_those_of_all_rows(stored: tuple[Path, dict[str, Any], np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, meta, rows = stored
    found = StoredReferences(str(folder), meta)
    np.testing.assert_array_equal(load_references(str(folder), meta).numpy(), rows)
    shutil.rmtree(folder)  # as that of a run behind a URL, once it was read
    assert found.shape == rows.shape and len(found) == 11
    for start in range(12):
        for stop in range(start, 13):
            np.testing.assert_array_equal(found[start:stop], rows[start:stop])
    monkeypatch.setattr(row_file, "BLOCK_VALUES", 4 * 6)
    assert len(list(blocks(found))) == 3
    np.testing.assert_array_equal(found.array(), rows)
    for references in (found, rows):
        assert np.flatnonzero(~are_set(references)).tolist() == [2, 9]


def test_a_space_is_the_same_of_files_and_of_memory(
    stored: tuple[Path, dict[str, Any], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, meta, rows = stored
    found = StoredReferences(str(folder), meta)
    kept = are_set(found)
    whole = ReferenceSpace(rows[kept])
    monkeypatch.setattr(row_file, "BLOCK_VALUES", 2 * 6)
    for space in (ReferenceSpace(found, kept), ReferenceSpace(rows, kept)):
        assert space.n_objects == 9
        np.testing.assert_array_equal(space._rows, whole._rows)
        np.testing.assert_array_equal(space.centres, whole.centres)

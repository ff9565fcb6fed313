"""safetensors files written as a stream."""

from __future__ import annotations

import hashlib
import io

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmref.storage import tensor_file


def test_the_safetensors_library_reads_every_kind_of_tensor(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {f"x/{d}": torch.randint(0, 2, (3, 5), generator=g).to(d) for d in tensor_file.DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        tensor_file.write_tensors(file, tensors, {"first": "7"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"first": "7"}


def test_a_tensor_may_come_in_pieces(tmp_path):
    rows = torch.randn(5, 2, 3)
    path = tmp_path / "a.safetensors"
    pieces = tensor_file.Pieces(tuple(rows.shape), rows.dtype, iter([rows[:2], rows[2:2], rows[2:]]))
    with open(path, "wb") as file:
        tensor_file.write_tensors(file, {"ids": torch.arange(3), "rows": pieces})
    found = load_file(path)
    assert torch.equal(found["rows"], rows) and found["ids"].tolist() == [0, 1, 2]


def test_bytes_and_hash_are_those_of_the_file(monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 64)
    file = io.BytesIO()
    hashing = tensor_file.Hashing(file)
    tensor_file.write_tensors(hashing, {"a": torch.arange(1000.0)})
    assert hashing.bytes == len(file.getvalue()) > 4000
    assert hashing.sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    file.seek(0)
    assert tensor_file.sha256_of_rest(file) == hashing.sha256

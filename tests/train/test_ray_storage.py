"""Ray Train's own files on a local run directory."""

from __future__ import annotations

import os
import pickle

import pyarrow.fs as pafs

from mmref.run.directory import RunDir
from mmref.train.ray_storage import ray_filesystem


def test_files_are_written_and_folders_removed(tmp_path):
    filesystem = ray_filesystem(RunDir(str(tmp_path)))
    filesystem = pickle.loads(pickle.dumps(filesystem))  # it travels to the workers
    assert filesystem == ray_filesystem(RunDir(str(tmp_path)))
    filesystem.create_dir(f"{tmp_path}/checkpoints/step-1")
    for text in (b"a longer one", b"{}"):
        with filesystem.open_output_stream(f"{tmp_path}/checkpoints/list.json") as file:
            file.write(text)
    assert (tmp_path / "checkpoints/list.json").read_bytes() == b"{}"
    filesystem.delete_dir(f"{tmp_path}/checkpoints/step-1")
    assert filesystem.get_file_info(f"{tmp_path}/checkpoints/step-1").type == pafs.FileType.NotFound


def test_a_full_disk_does_not_raise(tmp_path, monkeypatch, caplog):
    run = RunDir(str(tmp_path))
    filesystem = ray_filesystem(run)

    def full(path: str, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run.fs, "pipe_file", full)
    with filesystem.open_output_stream(f"{tmp_path}/list.json") as file:
        file.write(b"{}")
    assert "No space left on device" in caplog.text and not (tmp_path / "list.json").exists()

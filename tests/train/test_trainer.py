"""What a training refuses before it starts."""

from __future__ import annotations

import pytest
from support.tiny_set import tiny_config

from mmref.errors import RunDirectoryError
from mmref.run.directory import RunDir
from mmref.train.trainer import prepare_run


@pytest.mark.parametrize("held", ["manifest.json", "model.safetensors"])
def test_what_another_command_wrote_is_no_run_directory(tiny_set, tmp_path, held):
    (tmp_path / held).write_text("{}")
    (tmp_path / "config.yaml").write_text("of an export")
    with pytest.raises(RunDirectoryError, match=f"{tmp_path} is no run's: it holds {held}"):
        prepare_run(tiny_config(tiny_set, {}), RunDir(str(tmp_path)))
    assert (tmp_path / "config.yaml").read_text() == "of an export"

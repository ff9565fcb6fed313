"""The file system of a run as Ray Train sees it, which speaks pyarrow.

Ray Train creates the folder of checkpoints, keeps a list of them there and removes old ones; checkpoints themselves are
written by mmref.train.saver.
"""

from __future__ import annotations

import io
import logging
from typing import Any

from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler, PyFileSystem

from mmref.run.directory import RunDir

log = logging.getLogger(__name__)


def ray_filesystem(run: RunDir) -> PyFileSystem:
    """For ray.train.RunConfig(storage_filesystem=...)."""
    return PyFileSystem(_Handler(run.fs))


class _Handler(FSSpecHandler):
    """A file that cannot be written is a warning: Ray's list of checkpoints must not end a run whose disk is full for a moment.

    mmref finds checkpoints without the list (`repair_snapshot` removes one that is not whole), and its own writing
    decides when a full disk is an error.
    """

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_Written(self.fs, path), mode="w")


class _Written(io.BytesIO):
    """Bytes that become a file when they are closed."""

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self.fs, self.path = fs, path

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        try:
            self.fs.pipe_file(self.path, data)
        except Exception as error:  # every file system has its own exceptions
            log.warning("cannot write %s: %s: %s", self.path, type(error).__name__, error)

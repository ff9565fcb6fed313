"""The run directory: local or any fsspec URL.

config.yaml, metrics.jsonl (a line a log step), metrics.json (final), checkpoints/, report.html, tensorboard/.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import fsspec
import yaml

from mmref.config import Config, from_dict
from mmref.errors import RunDirectoryError


class RunDir:
    """Reads and writes small files of a run; `local` is whether it is on this machine's file system."""

    def __init__(self, path: str) -> None:
        self.local = "://" not in path
        # absolute: `ray job submit` runs in a copy of the working directory that is deleted afterwards
        self.path = os.path.abspath(os.path.expanduser(path)) if self.local else path.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.path)

    def join(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    def _inner(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def check_writable(self) -> None:
        """Create the directory and write a probe. Raises RunDirectoryError."""
        probe = self._inner(f".probe-{os.getpid()}")
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            with self.fs.open(probe, "wb") as file:
                file.write(b"mmref")
            self.fs.rm(probe)
        except Exception as error:  # every file system has its own exceptions
            raise RunDirectoryError(
                f"run directory {self.path} cannot be written: {error}. Choose another with `--run_dir`."
            ) from None

    def exists(self, name: str) -> bool:
        return self.fs.exists(self._inner(name))

    def list(self, name: str) -> list[str]:
        """Names inside a folder, [] where there is none."""
        self.fs.invalidate_cache()  # other processes write here as well
        if not self.fs.isdir(self._inner(name)):
            return []
        return sorted(os.path.basename(p.rstrip("/")) for p in self.fs.ls(self._inner(name), detail=False))

    def size(self, name: str) -> int | None:
        try:
            return int(self.fs.size(self._inner(name)))
        except FileNotFoundError:
            return None

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open(self._inner(name), "rb") as file:
            return file.read()

    def read_config(self) -> Config:
        """The run's resolved config. Raises RunDirectoryError where there is none, ConfigError for one of another version."""
        try:
            values = yaml.safe_load(self.read_text("config.yaml"))
        except (OSError, yaml.YAMLError) as error:
            raise RunDirectoryError(
                f"{self.join('config.yaml')} cannot be read ({error}): give the run directory of `mmref train`."
            ) from None
        return from_dict(values, self.join("config.yaml"))

    def write_text(self, name: str, text: str) -> None:
        """As `write_bytes`, in UTF-8."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace a file as a whole; a reader never sees half of it."""
        self.fs.makedirs(os.path.dirname(self._inner(name)), exist_ok=True)
        if not self.local:  # object stores replace objects atomically
            with self.fs.open(self._inner(name), "wb") as file:
                file.write(data)
            return
        target = self._inner(name)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=f".{os.path.basename(target)}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def remove(self, name: str) -> None:
        if self.fs.exists(self._inner(name)):
            self.fs.rm(self._inner(name), recursive=True)

    def fetch(self, name: str) -> str:
        """A local path of a folder of the run: itself, or a copy that is downloaded."""
        if self.local:
            return self._inner(name)
        target = tempfile.mkdtemp(prefix="mmref-")
        self.fs.get(self._inner(name) + "/", target + "/", recursive=True)
        return target


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended by one process."""

    def __init__(self, run: RunDir, name: str = "metrics.jsonl", keep_below_step: int | None = None) -> None:
        """Open for appending; lines at or after `keep_below_step` (of a run that was interrupted later) are dropped."""
        self.run, self.name = run, name
        kept = read_jsonl(run, name)
        if keep_below_step is not None:
            kept = [r for r in kept if r["step"] < keep_below_step]
        self.lines = [json.dumps(r) for r in kept]
        run.write_text(name, "".join(line + "\n" for line in self.lines))

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        if self.run.local:
            with open(f"{self.run.root}/{self.name}", "a") as file:
                file.write(line + "\n")
        else:  # objects cannot be appended to
            self.lines.append(line)
            self.run.write_text(self.name, "".join(x + "\n" for x in self.lines))


def read_jsonl(run: RunDir, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Records of a JSON-lines file, [] where there is none; a last line cut off by a crash is left out."""
    if not run.exists(name):
        return []
    return list(_parse(run.read_text(name).splitlines()))


def _parse(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue

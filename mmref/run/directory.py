"""The run directory: local or any fsspec URL. Every file and field of it is listed in docs/run-directory.md."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import yaml

from mmref.config import Config, from_saved
from mmref.errors import FileSystemMissingError, RunDirectoryError, StorageError
from mmref.storage.locations import absolute, file_system, is_url
from mmref.storage.locks import held
from mmref.storage.retries import retry

T = TypeVar("T")
OBJECT_STORES = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
}  # have no folders to create; a wrong bucket is not created
PATTERN = "*?["
UPLOAD_EVERY_S = 5.0  # at least, between two uploads of a file that grows
UPLOAD_BYTES_PER_S = 100_000  # that its uploads take at most in the mean: of 10 MB there is one in 100 s
DATA = "data_fingerprint"  # of a run: of the contents of its shard sets
TOKENIZER = "tokenizer"  # of a run that was made of an export: the tokenizer of that
BAD_SAMPLES = "bad_samples.json"  # of a run: the broken training images that it met


class RunDir:
    """Files of a run. `local` is whether it is on this machine's file system (or one mounted there, such as NFS).

    Every operation is tried again for a while when the storage fails, and then raises StorageError.
    """

    def __init__(self, path: str) -> None:
        self.local = not is_url(path)
        # The path is made absolute, since `ray job submit` runs in a copy of the working directory that is deleted
        # afterwards.
        self.path = absolute(path)
        if not self.local and (special := set(PATTERN) & set(self.path)):
            raise RunDirectoryError(
                f"run directory {self.path} holds {' '.join(sorted(special))}, which object storage takes for a pattern: "
                "removing a checkpoint could remove other runs'. Give another name."
            )
        # Listings are not cached, since other processes write here as well.
        options = {} if self.local else {"use_listings_cache": False}
        try:
            self.fs, self.root = file_system(self.path, **options)
        except FileSystemMissingError as error:
            raise RunDirectoryError(f"run directory {error}") from None
        self._has_folders = path.split("://")[0] not in OBJECT_STORES

    def join(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    def inner(self, *parts: str) -> str:
        """Path on `fs`, without the protocol."""
        return "/".join((self.root, *parts))

    def check_writable(self) -> None:
        """Create the directory and write a probe. Raises RunDirectoryError."""
        probe = self.inner(f".probe-{os.getpid()}")
        try:
            self._make_folder(probe)
            with self.fs.open(probe, "wb") as file:
                file.write(b"mmref")
            self.fs.rm(probe)
        except Exception as error:  # every file system has its own exceptions
            said = str(error) or type(error).__name__  # http's has no text
            raise RunDirectoryError(
                f"run directory {self.path} cannot be written: {said}. Choose another with `--run_dir`."
            ) from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Create the directory, and let no other job write to it meanwhile; behind a URL nobody can tell.

        Raises:
            RunDirectoryError: it cannot be written, or another job writes to it.
        """
        self.check_writable()
        with contextlib.ExitStack() as stack:
            if self.local:
                try:
                    stack.enter_context(held(self.inner(".lock")))
                except BlockingIOError as error:
                    raise RunDirectoryError(
                        f"run directory {self.path} is in use: {error} writes to it. Wait until that has ended, or give another "
                        "with `--run_dir`."
                    ) from None
            yield

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            return retry(f"look at {self.join(name)}", lambda: self.fs.info(self.inner(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        return self._info(name) is not None

    def is_folder(self, name: str) -> bool:
        info = self._info(name)
        return info is not None and info["type"] == "directory"

    def check_shared(self, name: str) -> None:
        """Raise StorageError where this node does not see what the driver wrote: each would keep its own part to itself."""
        if not self.exists(name):
            raise StorageError(
                f"node {socket.gethostname()} does not see {self.join(name)}, which the driver wrote: the run directory must be "
                "on storage that all nodes share. Give `--run_dir` on NFS or an s3:// URL."
            )

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        info = self._info(name)
        return None if info is None else int(info["size"])

    def list(self, name: str) -> list[str]:
        """Names inside a folder, [] where there is none."""
        return sorted(self.sizes(name))

    def sizes(self, name: str) -> dict[str, int]:
        """Names inside a folder with their bytes (0 for folders), {} where there is none."""
        folder = self.inner(name).rstrip("/")
        if not self.is_folder(name):
            return {}
        try:
            found = retry(f"list {self.join(name)}", lambda: self.fs.ls(folder, detail=True))
        except FileNotFoundError:  # removed meanwhile
            return {}
        inside = [i for i in found if i["name"].rstrip("/") != folder]  # an object store may list the folder itself
        return {i["name"].rstrip("/").rsplit("/", 1)[-1]: int(i["size"] or 0) for i in inside}

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def read_bytes(self, name: str) -> bytes:
        def read() -> bytes:
            with self.fs.open(self.inner(name), "rb") as file:
                return file.read()

        return retry(f"read {self.join(name)}", read)

    def read_from(self, name: str, offset: int) -> bytes:
        """Bytes of a file from an offset to its end: none where it is shorter, or not there."""

        def read() -> bytes:
            with self.fs.open(self.inner(name), "rb") as file:
                file.seek(offset)
                return file.read()

        try:
            return retry(f"read {self.join(name)}", read)
        except FileNotFoundError:
            return b""

    def read_json(self, name: str) -> Any:
        """What a JSON file of the run holds. Raises RunDirectoryError where it is damaged, OSError where there is none."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise RunDirectoryError(f"{self.join(name)} is damaged: {error}. Remove it, or make it again.") from None

    def read_fields(self, name: str) -> dict[str, Any]:
        """Names and values of a JSON file of the run, {} where there is none. Raises RunDirectoryError where it is damaged."""
        found = self.read_json(name) if self.exists(name) else {}
        if not isinstance(found, dict):
            raise RunDirectoryError(
                f"{self.join(name)} is damaged: it holds no names and values, but a {type(found).__name__}. Remove it, or make "
                "it again."
            )
        return found

    def read_config(self) -> Config:
        """The run's resolved config. Raises RunDirectoryError where there is none, ConfigError for one of another version."""
        try:
            values = yaml.safe_load(self.read_text("config.yaml"))
            if not isinstance(values, dict):
                raise ValueError("it holds no keys and values")
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunDirectoryError(
                f"{self.join('config.yaml')} cannot be read ({error}): give the run directory of `mmref train`."
            ) from None
        config = from_saved(values, self.join("config.yaml"))
        if self.exists(TOKENIZER):  # moves with the run, and the config has the place where it was written
            config.data.tokenizer = self.join(TOKENIZER)
        return config

    def write_text(self, name: str, text: str) -> None:
        """As `write_bytes`, in UTF-8."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace a file as a whole; a reader never sees half of it."""
        # Object stores replace objects atomically.
        write = self._replace_local if self.local else self._put
        retry(f"write {self.join(name)}", lambda: write(name, data))

    def _make_folder(self, path: str) -> None:
        """Create the folder that holds a path of `fs`."""
        if self._has_folders:
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)

    def _put(self, name: str, data: bytes) -> None:
        self._make_folder(self.inner(name))
        with self.fs.open(self.inner(name), "wb") as file:
            file.write(data)

    def _replace_local(self, name: str, data: bytes) -> None:
        target = self.inner(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=f".{os.path.basename(target)}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def write_stream(self, name: str, write: Callable[[Any], T]) -> T:
        """Result of `write(file)`, which writes a new file from its beginning and is called again when storage fails.

        On return the file is whole and on disk. A local reader may see a part of it before.
        """

        def attempt() -> T:
            self._make_folder(self.inner(name))
            with self.fs.open(self.inner(name), "wb") as file:
                result = write(file)
                if self.local:
                    file.flush()
                    os.fsync(file.fileno())
            return result

        return retry(f"write {self.join(name)}", attempt)

    def read_stream(self, name: str, read: Callable[[Any], T]) -> T:
        """Result of `read(file)`, which reads a file from its beginning and is called again when storage fails."""

        def attempt() -> T:
            with self.fs.open(self.inner(name), "rb") as file:
                return read(file)

        return retry(f"read {self.join(name)}", attempt)

    def put(self, folder: str, name: str) -> int:
        """Copy a local folder to `name` inside the run; its bytes."""
        files = sorted(os.listdir(folder))
        size = sum(os.path.getsize(f"{folder}/{file}") for file in files)
        retry(f"write {self.join(name)}", lambda: [self.fs.put_file(f"{folder}/{f}", self.inner(name, f)) for f in files])
        return size

    def remove(self, name: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(self.inner(name), recursive=True)

        retry(f"remove {self.join(name)}", remove)


class Uploads:
    """Brings something that grows to the storage from a thread of its own, as a whole each time, and rarer as it gets larger.

    What an upload raised is raised by the next call.
    """

    def __init__(self, upload: Callable[[], int]) -> None:
        """`upload` brings the present state there, and gives its bytes."""
        self._upload = upload
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmref-upload")
        self._last: Future[None] | None = None
        self._error: Exception | None = None
        self._next = time.monotonic() + UPLOAD_EVERY_S

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray Tune keeps copies of what records a sweep; a thread stays behind."""
        return Uploads, (self._upload,)

    def ask(self, at_once: bool = False) -> None:
        """Begin an upload, unless one is under way or it is too early for the next; `at_once` after the one under way."""
        if self._error:
            raise self._error
        if at_once or (time.monotonic() >= self._next and (self._last is None or self._last.done())):
            self._last = self._thread.submit(self._once)

    def _once(self) -> None:
        try:
            size = self._upload()
        except Exception as error:
            self._error = error
        else:
            self._error, self._next = None, time.monotonic() + max(UPLOAD_EVERY_S, size / UPLOAD_BYTES_PER_S)

    def finish(self) -> None:
        """Return when all that is there by now has arrived. What went wrong before may be mended: this brings it too."""
        self._thread.submit(self._once).result()
        if self._error:
            raise self._error


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended by one process."""

    def __init__(self, run: RunDir, name: str = "metrics.jsonl", keep_below_step: int | None = None) -> None:
        """Open for appending; lines at or after `keep_below_step` (of a run that was interrupted later) are dropped."""
        self.run, self.name = run, name
        kept = read_jsonl(run, name)
        if keep_below_step is not None:
            kept = [r for r in kept if r["step"] < keep_below_step]
        self._lines = [json.dumps(r) + "\n" for r in kept]  # behind a URL all, else none
        self._end = self._write()  # of the local file
        if run.local:
            self._lines = []
        self._uploads = Uploads(self._write)

    def _write(self) -> int:
        """Replace the file by the lines; its bytes."""
        data = "".join(self._lines).encode()
        self.run.write_bytes(self.name, data)
        return len(data)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. Behind a URL, where an object is replaced as a whole, it waits in memory for the next upload. Raises
        StorageError, there of an upload before."""
        line = json.dumps(record) + "\n"
        if self.run.local:
            retry(f"write {self.run.join(self.name)}", lambda: self._append_local(line.encode()))
            return
        self._lines.append(line)
        self._uploads.ask()

    def upload(self) -> None:
        """Begin to upload what waits. Raises as `append`."""
        if not self.run.local:
            self._uploads.ask(at_once=True)

    def flush(self) -> None:
        """Upload what waits, and return when it has arrived. Raises StorageError."""
        if not self.run.local:
            self._uploads.finish()

    def _append_local(self, line: bytes) -> None:
        descriptor = os.open(self.run.inner(self.name), os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.seek(self._end)
            file.truncate()  # the part of a line that a full disk took in an attempt before
            file.write(line)
        self._end += len(line)


class NewLines:
    """Follows a JSON-lines file that another process writes, reading what is new in it."""

    def __init__(self, run: RunDir, name: str = "metrics.jsonl") -> None:
        self.run, self.name = run, name
        self._at, self._last = 0, b""  # the last whole line that was read, and where in the file it begins

    def __call__(self) -> list[dict[str, Any]]:
        """Records of the lines since the last call; of all lines where the file is another by now, as after a resume."""
        data = self.run.read_from(self.name, self._at)
        if not data.startswith(self._last):
            self._at, self._last = 0, b""
            data = self.run.read_from(self.name, 0)
        whole = data[: data.rfind(b"\n") + 1]
        if lines := whole[len(self._last) :].splitlines(keepends=True):
            self._at, self._last = self._at + len(whole) - len(lines[-1]), lines[-1]
        return list(_parse(lines))


def read_jsonl(run: RunDir, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Records of a JSON-lines file, [] where there is none; a last line cut off by a crash is left out."""
    if not run.exists(name):
        return []
    return list(_parse(run.read_bytes(name).splitlines()))


def _parse(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue

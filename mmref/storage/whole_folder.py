"""Folders and files that appear as a whole: written beside the old ones, and put in their place when they are complete.

A folder is made in `<name>.partial` beside it, which one process holds at a time; the next start of the same command clears
what a killed one left there. It takes its name by one rename, and the place of an older one by one exchange. Where that cannot
be done (a mounted disk, a file system without exchange, other files in the folder) the files are moved one by one, the one that
makes the folder count as complete last; a start after a kill in that moment finishes the move.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mmref.errors import MMRefError, StorageError
from mmref.storage.disk import is_full, sync, sync_files, told_when_full
from mmref.storage.locations import below
from mmref.storage.locks import held

LOCK, NEW, MOVE = ".lock", "new", "move.json"  # inside <name>.partial
LOST_AND_FOUND = "lost+found"  # at the root of every ext4 disk
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
Owned = Callable[[Path], Iterable[str]]


@contextlib.contextmanager
def whole_folder(out: str, error: type[MMRefError], last: str, owned: Owned) -> Iterator[Path]:
    """A new folder to write in, which takes the place of `out` when the block ends; after a failure `out` is as it was.

    Args:
        out: path of the folder; a link to one stays a link.
        error: class of the errors.
        last: the file by which a folder is known to be complete.
        owned: of an `out` that exists the files that this command made, relative to it, which the new ones replace. All others
            stay where they are. It raises where `out` is not to be written.

    Raises:
        MMRefError: of the class `error`: `out` cannot be written, another process writes it, or a file that is not of the command
            is in the way. StorageError when the disk is full.
    """
    if "://" in str(out):
        raise error(f"{out} is a URL, and this command writes a folder: give a local one with --out, and copy it there.")
    target = Path(os.path.realpath(out))
    with told_when_full(target), contextlib.ExitStack() as stack:
        with _failures_named(target, error):
            if not any(place.exists() for place in _places(target)):  # else what a killed command left is cleared first
                _files_of_command(target, owned, error)
            partial = _place(target)
            stack.enter_context(held_folder(partial, target, error))
            stack.callback(_clear, partial)
            if (partial / MOVE).exists():
                try:
                    _move(partial, target)
                except ValueError as problem:
                    raise error(f"{partial / MOVE} is not of mmref ({problem}): remove {partial}.") from None
            _discard(partial / NEW)
            _files_of_command(target, owned, error)
            (partial / NEW).mkdir()
        yield partial / NEW
        with _failures_named(target, error):
            sync_files(partial / NEW)
            _put(partial, target, last, _files_of_command(target, owned, error), error)


@contextlib.contextmanager
def held_folder(folder: Path, target: Path, error: type[MMRefError]) -> Iterator[None]:
    """Make the folder in which `target` is written, and hold it. Raises `error` where another process does, or it is no such
    folder."""
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if not (folder / LOCK).exists() and (found := next(folder.iterdir(), None)) and found.name != LOCK:
                    raise error(
                        f"{target} would be made in {folder}, which is there already and was not made by mmref (it holds "
                        f"{found.name!r}). Move it away, or give another --out."
                    )
                stack.enter_context(held(str(folder / LOCK)))
                break
            except FileNotFoundError:  # who held it has finished and cleared it away just now
                continue
            except BlockingIOError as holder:
                raise error(f"{target} is in use: {holder} writes it. Wait for it, or give another --out.") from None
        yield


def strangers(folder: Path) -> list[str]:
    """Names in a folder that a user would miss in an empty one: all but hidden ones."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != LOST_AND_FOUND)


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file: after a failure or a kill it is the old or the new one. Raises OSError.

    A link stays a link, and what is no plain file (a terminal, a pipe) is written to.
    """
    data = data.encode() if isinstance(data, str) else data
    if _is_device(path):
        Path(path).write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")  # a name may have 255 bytes
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(option: str, path: str) -> None:
    """Raise StorageError where a file cannot be written: to be called before the work that it is to hold."""
    target = Path(os.path.realpath(path))
    problem = ""
    if "://" in path:
        problem = "it is a URL: give a local file, and copy it there"
    elif target.is_dir():
        problem = "it is a folder: name a file"
    elif not target.parent.is_dir() and not _is_device(path):
        problem = f"there is no folder {target.parent}"
    elif not os.access(path if _is_device(path) else target.parent, os.W_OK):
        problem = "no permission"
    if problem:
        raise StorageError(f"{option} {path} cannot be written: {problem}.")


def write_output(option: str, path: str, data: bytes | str) -> None:
    """Replace the file that an option of the command line names, as `write_whole`. Raises StorageError."""
    check_output(option, path)
    try:
        write_whole(path, data)
    except OSError as problem:
        raise StorageError(f"{option} {path} cannot be written: {problem}. What was there is as it was.") from problem


def _is_device(path: str | os.PathLike[str]) -> bool:
    """/dev/stdout is one also where the shell has sent it to a file."""
    return os.path.exists(path) and (not os.path.isfile(path) or os.fspath(path).startswith(("/dev/", "/proc/")))


def exchange(a: Path, b: Path) -> bool:
    """Swap two paths at once; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library without it
        return False
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return bool(rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


# -- steps -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _failures_named(target: Path, error: type[MMRefError]) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if is_full(problem):
            raise
        raise error(f"Cannot write to {target}: {problem}. Choose another folder with --out.") from problem


def _files_of_command(target: Path, owned: Owned, error: type[MMRefError]) -> set[str]:
    if not target.exists():
        return set()
    if not target.is_dir():
        raise error(f"Cannot write to {target}: it is no folder. Choose another with --out.")
    return set(owned(target))


def _places(target: Path) -> tuple[Path, Path]:
    """Where a folder may be made: beside it, inside it."""
    return Path(f"{target}.partial"), target / ".partial"


def _place(target: Path) -> Path:
    """Where a folder is made: inside itself only where nothing can be moved there from beside."""
    beside, inside = _places(target)
    if not target.is_dir():
        return beside
    name = f".probe-{os.getpid()}"  # of nothing: that two disks lie between is found out first, and nothing is left
    try:
        os.rename(target.parent / name, target / name)
    except FileNotFoundError:
        return beside if os.access(target.parent, os.W_OK) else inside
    except OSError:
        return inside
    return beside


def _put(partial: Path, target: Path, last: str, old: set[str], error: type[MMRefError]) -> None:
    """Put the new folder in its place."""
    new = partial / NEW
    if not target.exists():
        os.rename(new, target)
        sync(target.parent)
        return
    there, names = _files(target), _files(new)
    # Links count as files: what lies behind one may be on another disk.
    blocked = {name for name in there - old if name in names or any(n.startswith(f"{name}/") for n in names)}
    blocked |= {n for n in names if (target / n).is_dir()}
    if blocked:
        raise error(
            f"{target} holds {min(blocked)!r}, which this command did not make and would have to replace. Move it away, or "
            "give another --out."
        )
    if last in old and old >= there and all(any(p.iterdir()) for p in target.rglob("*") if p.is_dir()):
        os.chmod(new, stat.S_IMODE(target.stat().st_mode))
        if exchange(new, target):
            sync(target.parent)
            return
    write_whole(partial / MOVE, json.dumps({"last": last, "stale": sorted(old & there - names)}))
    try:
        _move(partial, target)
    except OSError as problem:
        raise error(
            f"{target} is half replaced: {problem}. The new files are whole in {partial}: mend it, then start the same command "
            "again, which finishes."
        ) from problem


def _move(partial: Path, target: Path) -> None:
    """Move the new files into a folder, and remove the old ones that have no successor; called again, it goes on."""
    plan = json.loads((partial / MOVE).read_text("utf-8"))
    new, last = partial / NEW, below(str(target), plan["last"]).removeprefix(f"{target}/")
    if (new / last).exists():
        (target / last).unlink(missing_ok=True)  # from here on nobody takes what is there for a whole
    names = sorted(_files(new) - {last})
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, target / name)
    for name in plan["stale"]:
        below(str(target), name)  # a folder that somebody else has packed may ask for anything
        if name != last:
            (target / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            if (parent := (target / name).parent) != target:
                parent.rmdir()
    for folder in {target, *((target / name).parent for name in names)}:
        sync(folder)
    if (new / last).exists():
        os.replace(new / last, target / last)
        sync(target)
    (partial / MOVE).unlink()


def _files(folder: Path) -> set[str]:
    """Files and links below a folder, relative to it, without those in a `.partial` of its own."""
    found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return {p.as_posix() for p in found if p.parts[0] != ".partial"}


def _clear(partial: Path) -> None:
    """Remove what was written and the folder itself, unless it holds a move that is to be finished or another's work.

    What cannot be removed stays for the next start: an error here would hide the one for which this is called, as where no file
    can be opened any more.
    """
    with contextlib.suppress(OSError):
        if (partial / MOVE).exists():
            return
        _discard(partial / NEW)
        for begun in partial.glob(f".{MOVE}.*.tmp"):
            begun.unlink()
        if [p.name for p in partial.iterdir()] == [LOCK]:
            (partial / LOCK).unlink()
            partial.rmdir()  # an error where another process has begun in it


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

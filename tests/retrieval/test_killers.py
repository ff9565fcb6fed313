"""Images that end the process which decodes them: found out, left out, listed, and never decoded again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmref.errors import ModelError, StorageError
from mmref.retrieval import chunks, index
from mmref.retrieval.journal import KILLED, Journal
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.set_aside import read_skipped

KILLER = "02.png"
# SIGKILL is what the system sends where memory runs out
START = """
import os, signal, sys
from mmref.retrieval import chunks, index
decoded = chunks.decoded
def deadly(data, name, *rest):
    if name.endswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return decoded(data, name, *rest)
chunks.decoded, chunks.SMALLEST_CHUNK = deadly, 4
index.create(*sys.argv[1:4], workers=0)
"""


def listed(out: Path) -> dict[str, str]:
    return {s["id"]: s["problem"] for s in read_skipped(out)}


def test_an_image_that_kills_the_process_twice_is_passed_over(folder, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for _ in range(2):
        command = [sys.executable, "-c", START, str(folder), str(run), str(out), KILLER]
        assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    decoded, seen = chunks.decoded, []

    def noted(data, name):
        seen.append(Path(name).name)
        return decoded(data, name)

    monkeypatch.setattr(chunks, "decoded", noted)
    manifest = index.create(str(folder), str(run), str(out), workers=0)
    assert (manifest.items, manifest.skipped) == (10, 2)
    assert listed(out)[KILLER] == KILLED and "not an image" in listed(out)["deep/broken.jpg"]
    assert not (out / chunks.JOURNAL).exists()
    assert index.add(str(out), str(folder), workers=0).items == 10
    assert seen and KILLER not in seen, "it is never decoded a third time"
    os.utime(folder / KILLER, (1, 1))  # somebody has mended it
    assert index.add(str(out), str(folder), workers=0).items == 11
    assert KILLER in seen and set(listed(out)) == {"deep/broken.jpg"}


def test_a_kill_blames_nothing_that_is_decoded_alone_the_next_time(tmp_path):
    path = tmp_path / "decoding"
    with Journal(path, ["d"]) as journal:
        watch = journal.watch(["a", "b", "c", "d"])
        assert (list(watch.passed_over), list(watch.suspects)) == ([3], [])
        with watch.decoding(0):
            pass
        journal.note("+", "b")  # and the process is gone
        journal.note("+", "c")
    with Journal(path, []) as journal:
        watch = journal.watch(["a", "b", "c"])
        assert list(watch.suspects) == [1, 2] and not watch.passed_over
        with pytest.raises(KeyboardInterrupt), watch.decoding(1):
            raise KeyboardInterrupt
        journal.note("+", "c")
    with Journal(path, []) as journal:
        watch = journal.watch(["a", "b", "c"])
        assert (list(watch.passed_over), list(watch.suspects)) == ([2], []), "b was outlived"
        journal.forget()
    with Journal(path, []) as journal:
        assert list(journal.watch(["a", "b", "c"]).passed_over) == [2]


def test_a_journal_that_cannot_be_written_blames_no_image(folder, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "forget", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr("mmref.retrieval.journal.os.write", full)
        with pytest.raises(StorageError, match=r"no space left for .*decoding"):
            index.create(str(folder), str(run), str(tmp_path / "out"), workers=0)
    assert index.create(str(folder), str(run), str(tmp_path / "out"), workers=0).items == 11


@pytest.mark.slow
def test_ray_workers_die_of_it_twice_at_a_time_and_the_rest_is_embedded(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 4)

    class Deadly(chunks.ImageEmbedder):
        """Defined here, so that it travels to the workers as it is."""

        def __init__(self, *args):
            super().__init__(*args)
            from mmref.retrieval import chunks

            decoded = chunks.decoded

            def deadly(data, name, *rest):
                if name.endswith("02.png"):
                    os._exit(1)
                return decoded(data, name, *rest)

            chunks.decoded = deadly

    class Unfit:
        def __init__(self, *args):
            raise ModelError("these weights are of another model")

    class Away(chunks.ImageEmbedder):
        def embed(self, *args):
            raise StorageError("the share is away")

    away, unfit = (Away, StorageError, "the share is away"), (Unfit, ModelError, "these weights are of another model")
    for embedder, error, said in (away, unfit):
        monkeypatch.setattr(chunks, "ImageEmbedder", embedder)
        with pytest.raises(error, match=f"^{said}$"):
            index.create(str(folder), str(run), str(tmp_path / "out"), workers=2)
    monkeypatch.setattr(chunks, "ImageEmbedder", Deadly)
    index.create(str(folder), str(run), str(tmp_path / "out"), workers=2)
    monkeypatch.undo()
    assert listed(tmp_path / "out")["02.png"] == KILLED and len(listed(tmp_path / "out")) == 2
    index.create(str(folder), str(run), str(tmp_path / "reference"), workers=0)
    found, wanted = (Searcher(str(tmp_path / name)) for name in ("out", "reference"))
    for name in found.items["id"].to_pylist():
        of = [s.segments[0].features[s.row(name)] for s in (found, wanted)]
        np.testing.assert_allclose(*of, atol=1e-5)
    assert len(found) == len(wanted) - 1 == 10

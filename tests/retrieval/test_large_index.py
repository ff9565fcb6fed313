"""Indexes that take less memory than their features: IVF-PQ, how it is chosen, built in parts and told."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from support.images import write_images
from support.old_index import as_of_old

from mmref.cli import main
from mmref.errors import SearchIndexError
from mmref.evaluate.refinement import RefinementSettings
from mmref.retrieval import index, parts, segment, size, vectors
from mmref.retrieval.exact import exact
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.ranking import Encoded, Ranker
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.segment import Segment
from mmref.retrieval.vector_file import build_vectors, open_vectors
from mmref.retrieval.vectors import Approximate, code_bytes
from mmref.storage.array_file import let_go


def clustered(rows: int, dim: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, dim))[rng.integers(0, 50, rows)] + 0.6 * rng.standard_normal((rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def segment_of(folder: Path, features: np.ndarray, first_uid: int = 0) -> Segment:
    """A segment of features alone, with items that are numbers."""
    import pyarrow as pa

    n = len(features)
    names = [str(first_uid + i) for i in range(n)]
    rows = pa.table({"id": names, "path": names, "object_id": names})
    arrays = {"position": np.arange(n), "features": features, "size": np.zeros((n, 2), np.int32),
              "thumbnail_bytes": np.zeros(n, np.int64), "thumbnails": np.zeros(0, np.uint8)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "FULL_PRECISION_UP_TO", 0)  # as in an index that is large
        segment.write_segment(folder, [(rows, arrays)], first_uid, n, features.shape[1])
    return Segment(folder)


def test_ivfpq_is_tuned_to_the_recall_and_scores_by_the_features(tmp_path):
    features = clustered(6000)
    queries = features[::60].astype(np.float32)
    found = Approximate.build("ivfpq", [features], np.arange(6000))
    reached = found.tune(queries, [features], np.arange(6000), 0.97)
    assert reached >= 0.97 and found.candidates in vectors.PQ_CANDIDATES
    scores, rows = found.search(queries, [features], np.arange(6000), 10)
    truth, nearest = exact(queries, [features], 10)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, nearest)]) == pytest.approx(reached)
    np.testing.assert_allclose(scores[:, 0], truth[:, 0], atol=1e-6)
    found.write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 0.5 * features.nbytes


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfpq"])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_few_vectors_and_equal_ones_are_found(kind, count):
    features = np.repeat(clustered(1).astype(np.float32), count, 0)
    found = Approximate.build(kind, [features], np.arange(count))
    scores, rows = found.search(features[:1], [features], np.arange(count), min(count, 5))
    assert len(set(rows[0].tolist())) == min(count, 5) and (rows >= 0).all()
    np.testing.assert_allclose(scores, features[0] @ features[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfpq"])
def test_items_that_were_removed_take_no_places(kind):
    """All of a query's nearest are removed, and many more than are asked for."""
    others = clustered(400).astype(np.float32)
    theme = others[:1] + 0.03 * np.random.default_rng(1).standard_normal((150, 64)).astype(np.float32)
    features = np.concatenate([theme, others])
    found = Approximate.build(kind, [features], np.arange(550))
    found._apply(512 if kind == "hnsw" else found.index.nlist)
    queries, left = np.stack([others[0], others[-1]]), np.arange(150, 550)
    for k in (5, 20):
        scores, rows = found.search(queries, [others], left, k)
        assert rows.shape == (2, k) and (rows >= 0).all()
        np.testing.assert_allclose(scores, np.einsum("qkd,qd->qk", others[rows], queries), atol=1e-5)
        nearest = exact(queries, [others], k)[1]
        assert min(len(np.intersect1d(a, b)) for a, b in zip(rows, nearest)) >= 0.5 * k, "the nearest of those that remain"
    if kind != "hnsw":  # links of a graph may not lead to all
        _, rows = found.search(queries, [others[:3]], left[:3], 3)
        assert sorted(rows[0]) == sorted(rows[1]) == [0, 1, 2], "all that remain"


def test_an_open_ivfpq_keeps_its_lists_on_the_disk(tmp_path):
    features = clustered(3000)
    built = Approximate.build("ivfpq", [features], np.arange(3000))
    built.write(tmp_path / "file")
    queries = features[:5].astype(np.float32)
    expected = built.search(queries, [features], np.arange(3000), 10)
    mapped = Approximate.open(tmp_path / "file", "ivfpq", 1, 64)
    assert isinstance(faiss.downcast_InvertedLists(mapped.index.invlists), faiss.OnDiskInvertedLists)
    for one, other in zip(mapped.search(queries, [features], np.arange(3000), 10), expected):
        np.testing.assert_array_equal(one, other)
    added = Approximate.open(tmp_path / "file", "ivfpq", 1, 64, writable=True)
    added.add(features[:10], np.arange(3000, 3010))
    assert len(added) == 3010


def held_of(file: Path) -> int:
    """Bytes of a mapped file that are this process's own."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024 for line in lines if str(file) in line
    )


@pytest.mark.parametrize("kind", ["ivfpq", "ivf"])
def test_searches_keep_nothing_of_the_features_where_memory_is_short(tmp_path, kind):
    part = segment_of(tmp_path / "0", clustered(20_000))
    ranker = Ranker([part], Approximate.build(kind, [part.features], part.uids), None, RefinementSettings())
    queries = Encoded(part.features[::500].astype(np.float32))
    let_go([part.features])
    for among in (None, np.arange(0, 20_000, 3)):
        rows, scores, *_ = ranker.rank(queries, 20, among=among)
        held = held_of(tmp_path / "0" / "features.npy") / part.features.nbytes
        assert held < 0.02 if kind == "ivfpq" else held > 0.5
        exactly = np.einsum("qkd,qd->qk", part.features[rows].astype(np.float32), queries.features)
        np.testing.assert_allclose(scores[rows >= 0], exactly[rows >= 0], atol=1e-5)
        let_go([part.features])


def test_parts_make_what_one_process_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 700)
    features = clustered(3000)
    (tmp_path / "segments").mkdir()
    segments = [
        segment_of(tmp_path / "segments" / "0", features[:2000]),
        segment_of(tmp_path / "segments" / "1", features[2000:], 2000),
    ]
    assert len(parts.parts_of(segments)) == 5
    told = {n: build_vectors(tmp_path, "ivfpq", n + 1, segments, None, 0.9, workers=n) for n in (0, 2)}
    assert told[0]["sha256"] == told[2]["sha256"] and told[0]["recall@10"] == told[2]["recall@10"] >= 0.9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["segments", "vectors-000001", "vectors-000003"]


@pytest.mark.parametrize(
    "items, memory, kind",
    [(1000, None, "flat"), (1000, 1000, "ivfpq"), (1_000_000, 600 << 20, "flat"), (1_000_000, 400 << 20, "ivf"),
     (1_000_000, 200 << 20, "ivfpq"), (10_000_000, 4 << 30, "ivf"), (10_000_000, 2 << 30, "ivfpq")],
)  # fmt: skip
def test_auto_goes_by_size_and_memory(items, memory, kind):
    chosen, why = size.chosen_kind("auto", items, 256, memory)
    assert chosen == kind and why.startswith(f"{kind} was chosen: searches keep ")
    assert ("half of the memory of this machine" in why) == (memory is None)


def test_a_kind_that_was_asked_for_stays_and_says_that_it_is_too_large():
    chosen, why = size.chosen_kind("flat", 10_000_000, 256, 2_000_000_000)
    assert chosen == "flat" and why == "flat was asked for: searches keep 5.1 GB in memory, of 2.0 GB. That is more."
    assert code_bytes(256) == 64 and code_bytes(512) == 64 and code_bytes(48) == 12 and code_bytes(3) == 1


def test_memory_of_a_container_counts(tmp_path):
    whole = size.machine_memory(tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert size.machine_memory(tmp_path) == 1_000_000 < whole
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()  # of version 1, where a number beyond all memory says that there is no limit
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2000000\n")
    assert size.machine_memory(tmp_path) == 2_000_000
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert size.machine_memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("max\n")
    assert size.machine_memory(tmp_path) == whole


def test_the_command_chooses_by_memory_and_says_so(run, tmp_path, capsys):
    write_images(tmp_path / "images", range(80))
    out = str(tmp_path / "out")
    command = ["index", str(tmp_path / "images"), "--model", str(run), "--out", out, "--workers", "0"]
    with pytest.raises(SystemExit):
        main([*command, "--memory", "much"])
    assert "must be a size such as 2GB" in capsys.readouterr().err
    assert main([*command, "--memory", "500B"]) == 0
    said = capsys.readouterr()
    assert "ivfpq was chosen: searches keep " in said.err and "of 0.0 MB. That is more." in said.err
    assert "memory when open: 0.0 MB loaded, " in said.out and "recall@10" in said.out
    assert Manifest.read(Path(out)).kind == "ivfpq"
    assert main(["index", "info", out]) == 0
    assert "mapped from disk, of both" in capsys.readouterr().out


def test_a_damaged_table_of_items_is_named(own_index):
    (file,) = own_index.glob("segments/*/items.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SearchIndexError, match="the index is damaged; make it again"):
        Searcher(str(own_index))


def test_an_index_of_an_older_version_opens_grows_and_is_joined(folder, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    index.create(str(folder), str(run), str(out), workers=0)
    before = {r.id: r.score for r in Searcher(str(out)).search("red star", top=11)}
    as_of_old(out / "segments" / "000000", without="file_sha256")
    assert Searcher(str(out)).segments[0].features.dtype == np.float32
    write_images(folder, range(11, 14))
    monkeypatch.setattr(segment, "FULL_PRECISION_UP_TO", 12)
    index.add(str(out), str(folder), workers=0)
    grown = Searcher(str(out))
    assert [s.features.dtype for s in grown.segments] == [np.float32, np.float16]
    after = {r.id: r.score for r in grown.search("red star", top=14)}
    assert {name: after[name] for name in before} == pytest.approx(before, abs=1e-6)
    index.remove(str(out), ["00.png"])
    monkeypatch.setattr(index, "MOST_SEGMENTS", 1)
    write_images(folder, [20])
    index.add(str(out), str(folder), workers=0)
    (joined,) = Searcher(str(out)).segments
    assert joined.features.dtype == np.float32, "none of what was kept is rounded"
    shutil.rmtree(out)


def test_an_ivfpq_is_synced(folder, run, tmp_path):
    write_images(folder, range(11, 60))
    out = tmp_path / "out"
    index.create(str(folder), str(run), str(out), kind="ivfpq", workers=0)
    write_images(folder, range(60, 64))
    (folder / "00.png").unlink()
    manifest = index.sync(str(out), index.sources_of(str(out))[0], workers=0)
    held = open_vectors(out, Manifest.read(out))
    assert manifest.items == 63 and held is not None and len(held) == 64, "the one removed is passed over"
    found = {r.id for r in Searcher(str(out)).search("blue circle", top=63)}
    assert "00.png" not in found and any(name in found for name in ("60.png", "62.png"))

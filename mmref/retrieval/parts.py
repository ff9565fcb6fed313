"""An IVF-PQ index filled in parts by Ray tasks on this machine: each encodes some rows of a segment into a file, and the files
are merged in order, so that the index is the one that a single process would have made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from mmref.retrieval.segment import Segment
from mmref.retrieval.vectors import Approximate
from mmref.terminal.progress import Counter

PART_ROWS = 1_000_000


def parts_of(segments: Sequence[Segment]) -> list[tuple[Path, int, int]]:
    """Folder of the segment, first row and end of each part."""
    return [(s.folder, start, min(start + PART_ROWS, len(s))) for s in segments for start in range(0, len(s), PART_ROWS)]


def encode_part(trained: Path, segment: Path, start: int, stop: int, out: Path) -> None:
    """Write what a trained, empty IVF-PQ index makes of some rows of a segment."""
    part = Approximate(faiss.read_index(str(trained)), "ivfpq", 1)
    features, uids = (np.load(segment / name, mmap_mode="r")[start:stop] for name in ("features.npy", "uids.npy"))
    part.add(features, uids)
    part.write(out)


def fill_in_parts(approximate: Approximate, work: Path, segments: Sequence[Segment], workers: int) -> None:
    """Fill a trained index from segments, by tasks of a CPU each, `workers` at a time. Files go through the folder `work`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from mmref.cluster.answers import answer_of
    from mmref.cluster.connection import connect

    trained, parts = work / "trained", parts_of(segments)
    work.mkdir(parents=True, exist_ok=True)
    approximate.write(trained)
    with connect(workers), Counter("encoding", sum(map(len, segments)), "image") as progress:
        # The files lie on this machine, so the tasks run here.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        task: Any = ray.remote(num_cpus=1)(encode_part).options(scheduling_strategy=here)
        running: list[tuple[Any, Path, int]] = []

        def take_first() -> None:
            answer, file, rows = running.pop(0)
            answer_of(answer)
            approximate.merge(file)
            file.unlink()
            progress.add(rows)

        for number, (folder, start, stop) in enumerate(parts):
            if len(running) == workers:
                take_first()
            file = work / f"part-{number:06d}"
            running.append((task.remote(trained, folder, start, stop, file), file, stop - start))
        while running:
            take_first()

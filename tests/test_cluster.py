"""What a local cluster takes of its machine."""

from __future__ import annotations

import pytest

from mmref.cluster import cores, object_store_bytes

GB = 1e9


@pytest.mark.parametrize(
    ("asked", "memory", "shm", "bytes_"),
    [
        (1.0, 64 * GB, 32 * GB, 1.0 * GB),
        (0.01, 64 * GB, 32 * GB, 0.1 * GB),
        (16.0, 16 * GB, 8 * GB, 4.8 * GB),  # a machine of 16 threads and 16 GB, a trial on each
        (30.0, 128 * GB, 64 * GB, 30.0 * GB),
        (30.0, 128 * GB, 0.064 * GB, 9.9 * GB),  # a container's /dev/shm: from 10 GB on Ray would refuse
        (30.0, 128 * GB, 20 * GB, 18.0 * GB),
        (30.0, 128 * GB, None, 30.0 * GB),
    ],
)
def test_the_object_store_is_as_large_as_the_machine_has_room_for(
    asked: float, memory: float, shm: float | None, bytes_: float
) -> None:
    assert object_store_bytes(asked, memory, shm) == pytest.approx(bytes_, rel=1e-6)


def test_cores_are_those_this_process_may_use() -> None:
    import os

    assert 1 <= cores() <= (os.cpu_count() or 1)

"""What killed processes leave behind in Ray's coordinator of Data and Train.

Each training and each dataset reserves resources there under a name of its own, renewed while it runs and kept for three
minutes after that. One that was killed cannot give its reservation back: where the cluster has nothing to spare, Ray Data
would be granted no CPU for what takes its place, and wait in silence. So each place in a run notes its holder's name in
the cluster's key-value store, and whoever takes the place cancels the reservation of the one before.
"""

from __future__ import annotations

from mmref.cluster.ray_private import get_note, list_notes, put_note, remove_note

COORDINATOR = "AutoscalingCoordinator"  # Ray's: actor and namespace


def take_place(run_dir: str, place: str, requester: str, also: tuple[str, ...] = ()) -> None:
    """Note `requester` as the holder of `place` in a run, and cancel the reservations of its holder before.

    `also`: places that nobody holds any more, whose reservations go too.
    """
    for name in (place, *also):
        before = get_note(_key(run_dir, name))
        if before and before != requester:
            _cancel(before)
    for name in also:
        remove_note(_key(run_dir, name))
    put_note(_key(run_dir, place), requester)


def take_reader_place(run_dir: str, rank: int, world: int, requester: str) -> None:
    """As `take_place` for the readers of a rank; ranks of a larger group that was lost are shared out over the ranks."""
    prefix = _key(run_dir, "reader-")
    known = [int(key.removeprefix(prefix)) for key in list_notes(prefix)]
    gone = tuple(f"reader-{r}" for r in known if r >= world and r % world == rank)
    take_place(run_dir, f"reader-{rank}", requester, gone)


def _key(run_dir: str, place: str) -> str:
    return f"mmref-place:{run_dir}:{place}"


def _cancel(requester: str) -> None:
    import ray

    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:
        return  # nothing was ever reserved on this cluster
    coordinator.cancel_request.remote(requester)

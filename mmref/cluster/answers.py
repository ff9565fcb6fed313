"""What a task or an actor of Ray answers."""

from __future__ import annotations

from typing import Any

from mmref.errors import MMRefError


def answer_of(reference: Any) -> Any:
    """The value of a task that was started. An error of ours that it raised comes out as itself, where Ray's own copy of it has a
    traceback for its text. Raises what `ray.get` does."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MMRefError):
            raise error.cause from None
        raise

"""Whether there are objects enough for references: a rule of thumb, measured in docs/references.md#how-many-objects."""

from __future__ import annotations

ENOUGH = 250  # objects of training
WITHOUT = "--loss.w_fuse 0 --loss.w_guide 0 --loss.w_rec 0"  # flags of a training that has none


def few_objects(objects: int) -> str:
    """What to say of so many objects with references, "" where they are enough or there are none."""
    if not 0 < objects < ENOUGH:
        return ""
    return (
        f"{objects:,} objects are few for references, which have paid from about {ENOUGH:,} on: compare with a training without "
        f"them ({WITHOUT})"
    )

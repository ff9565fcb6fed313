"""Why an item ranks where it does: where in the image the match lies, and which references the two resemble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID = 7  # cells of the map on each side: GRID^2 + 1 images are encoded
NEAREST = 5


@dataclass(frozen=True)
class Resemblance:
    """A training object and its cosines with the query and with the item."""

    object_id: str
    caption: str  # "" where it is not known
    query: float
    item: float


@dataclass(frozen=True)
class Explanation:
    """`heat` is the loss of cosine when a part of the image is hidden: an explanation by trial, right for any tower."""

    id: str
    cosine: float
    heat: NDArray[np.float32]  # (GRID, GRID), rows from the top; negative: hiding that part makes the match better
    references: list[Resemblance]  # nearest to both (by the lower of the two cosines)
    query_references: list[Resemblance]  # nearest to the query
    item_references: list[Resemblance]  # nearest to the item


def heat_maps(features: NDArray[np.float32], wanted: NDArray[np.float32], grid: int) -> NDArray[np.float32]:
    """What hiding each cell costs in cosine with each wanted feature: (w, grid, grid).

    Args:
        features: (1 + grid^2, d) of the images that `hidden` made, L2-normalised.
        wanted: (w, d) L2-normalised features: a caption's, a reference's, the image's own.
    """
    cosines = (features @ wanted.T).T  # (w, 1 + grid^2)
    return (cosines[:, :1] - cosines[:, 1:]).reshape(len(wanted), grid, grid).astype(np.float32)


def hidden(pixels: NDArray[np.uint8], grid: int) -> list[NDArray[np.uint8]]:
    """The image (H, W, 3) itself, then with each cell hidden, row by row."""
    height, width = pixels.shape[:2]
    mean = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    images = [pixels]
    for row in range(grid):
        for column in range(grid):
            image = pixels.copy()
            image[_patch(row, grid, height), _patch(column, grid, width)] = mean
            images.append(image)
    return images


def _patch(cell: int, grid: int, size: int) -> slice:
    """A cell widened by half its side in both directions."""
    side = size / grid
    start, stop = (cell - 0.5) * side, (cell + 1.5) * side
    return slice(max(0, round(start)), max(1, round(stop)))


def nearest(
    cosines: NDArray[np.float32],
    score: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]],
    named: Callable[[int], tuple[str, str]],
) -> list[Resemblance]:
    """The references with the highest score(cosines with the query, cosines with the item).

    Args:
        cosines: (2, m) of the query and of the item with every reference.
        named: object id and caption of a reference's row.
    """
    order = np.argsort(-score(*cosines), kind="stable")[:NEAREST]
    return [Resemblance(*named(int(row)), float(cosines[0, row]), float(cosines[1, row])) for row in order]

"""Why an item ranks where it does: where in the image the match lies, and which references the two resemble."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmref.data.decode import decode_rgb, resize_rgb
from mmref.errors import QueryError
from mmref.evaluate.refinement import ReferenceSpace
from mmref.retrieval.searcher import Query, Searcher

GRID = 7  # cells of the map on each side: GRID^2 + 1 images are encoded
NEAREST = 5
BATCH = 10  # images encoded at a time


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


def explain(
    searcher: Searcher, query: Query | str, item_id: str, grid: int = GRID, encoded: bytes | None = None
) -> Explanation:
    """Explain one result.

    Args:
        grid: cells of the map on each side. Each is hidden in turn, under a patch twice its side so that neighbours overlap,
            painted in the image's mean colour.
        encoded: the image as it was indexed, where it has been read already.

    Raises:
        QueryError: an empty query or an unknown item. SampleError: the image is gone.
    """
    if grid < 1:
        raise QueryError(f"the grid of a heat map is {grid}: give at least 1 cell on each side.")
    query = query if isinstance(query, Query) else Query(query)
    wanted = searcher.encode([query]).features[0]
    data = searcher.model.config.data
    rgb = decode_rgb(searcher.image_bytes(item_id) if encoded is None else encoded, item_id)
    images = hidden(resize_rgb(rgb, data.image_height, data.image_width), grid)
    # a few at a time: searches of other threads want the model too
    features = np.concatenate([searcher.encode_pixels(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
    resemble = _Resemblances(searcher, wanted, features[0])
    return Explanation(
        id=item_id,
        cosine=float(features[0] @ wanted),
        heat=heat_maps(features, wanted[None], grid)[0],
        references=resemble.by(np.minimum),
        query_references=resemble.by(lambda query, item: query),
        item_references=resemble.by(lambda query, item: item),
    )


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


class _Resemblances:
    """Cosines of a query and an item with every reference."""

    def __init__(self, searcher: Searcher, query: NDArray[np.float32], item: NDArray[np.float32]) -> None:
        model = searcher.model
        self.searcher, self.cosines = searcher, np.zeros((2, 0), np.float32)
        if model.references is not None:
            space = model.space or ReferenceSpace(model.references)
            self.cosines = space.similarities(np.stack([query, item]))

    def by(self, score) -> list[Resemblance]:  # type: ignore[no-untyped-def]
        """The references with the highest score(cosine with the query, cosine with the item)."""
        order = np.argsort(-score(*self.cosines), kind="stable")[:NEAREST]
        named = [self.searcher.reference(int(row), 0.0) for row in order]
        return [
            Resemblance(name.object_id, name.caption, float(self.cosines[0, row]), float(self.cosines[1, row]))
            for row, name in zip(order, named)
        ]

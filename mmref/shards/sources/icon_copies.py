"""Finds icons that are one drawing: sets copy from each other, with other margins, weights and sizes.

All sums are of whole numbers small enough for float32, so what is found does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

SIDE = 24  # of a print, cells
LEVELS = 15  # ink of a cell, 0 to this: sums over a print stay below 2**24
INK_FROM = 32  # of 255; what is fainter is no edge of a drawing
APART = 0.1  # of the picture's side: how far the middles of copies may lie apart
LARGER = 1.5  # times as large as the other one a copy may be
BLOCK = 256  # prints that are compared with all others at a time


@dataclass(frozen=True)
class Prints:
    """What drawings look like, whatever their margins."""

    cells: np.ndarray  # (n, SIDE * SIDE) float32, whole numbers: ink of the drawing, cut to its edges and blurred a little
    boxes: np.ndarray  # (n, 3) float64: middle (x, y) and longer side of the drawing in its picture, of the picture's side

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: slice | Sequence[int]) -> Prints:
        return Prints(self.cells[rows], self.boxes[rows])


def prints_of(images: Sequence[Image.Image]) -> Prints:
    """Prints of square pictures on white, each of which shows something."""
    found = [_print(image) for image in images]
    cells = np.array([cell for cell, _ in found], np.float32).reshape(-1, SIDE * SIDE)
    return Prints(cells, np.array([box for _, box in found], np.float64).reshape(-1, 3))


def join(prints: Sequence[Prints]) -> Prints:
    """One after the other."""
    empty = prints_of([])
    return Prints(*(np.concatenate([getattr(each, name) for each in (empty, *prints)]) for name in ("cells", "boxes")))


def _print(image: Image.Image) -> tuple[np.ndarray, tuple[float, float, float]]:
    ink = image.convert("L").point(lambda value: 255 - value)
    left, top, right, bottom = ink.point(lambda value: 255 * (value >= INK_FROM)).getbbox() or (0, 0, *ink.size)
    longer = max(right - left, bottom - top)
    width, height = (max(1, round(length * (SIDE - 2) / longer)) for length in (right - left, bottom - top))
    square = Image.new("L", (SIDE, SIDE))
    cut = ink.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BOX)
    square.paste(cut, ((SIDE - width) // 2, (SIDE - height) // 2))
    blurred = np.asarray(square.filter(ImageFilter.BoxBlur(1)), np.uint16)
    box = ((left + right) / 2 / image.width, (top + bottom) / 2 / image.width, longer / image.width)
    return ((blurred * LEVELS + 127) // 255).reshape(-1), box


def alike(some: Prints, others: Prints) -> np.ndarray:
    """Correlation of prints (n) and (m), (n, m) float64; 0 where they lie apart or are of other sizes, or have no contrast."""
    sums, spreads = zip(*(_moments(prints.cells) for prints in (some, others)), strict=True)
    found = (some.cells @ others.cells.T).astype(np.float64)
    found *= SIDE * SIDE
    found -= np.outer(*sums)
    found /= np.maximum(spreads[0], 1)[:, None]
    found /= np.maximum(spreads[1], 1)
    for axis in (0, 1):
        found[np.abs(some.boxes[:, axis, None] - others.boxes[:, axis]) > APART] = 0
    ratio = some.boxes[:, 2, None] / others.boxes[:, 2]
    found[(ratio > LARGER) | (ratio < 1 / LARGER)] = 0
    return found


def _moments(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of each print's cells, and the root of cells times their squares' sum less its square."""
    exact = cells.astype(np.float64)
    sums = exact.sum(1)
    return sums, np.sqrt(SIDE * SIDE * (exact**2).sum(1) - sums**2)


def copies(prints: Prints, above: float) -> list[tuple[int, int]]:
    """Prints that are like an earlier one which is no copy itself: pairs (copy, the first such one)."""
    found: list[tuple[int, int]] = []
    kept: list[int] = []
    matrix = alike(prints, prints)
    for i in range(len(prints)):
        match = next((k for k in kept if matrix[i, k] > above), None)
        if match is None:
            kept.append(i)
        else:
            found.append((i, match))
    return found


def shared(prints: Prints, objects: Sequence[int], above: float) -> list[tuple[int, int]]:
    """Pairs of prints of different objects that are alike, (first, second) with first < second, in order.

    Args:
        objects: of each print, a number.
    """
    owner, found = np.asarray(objects), []
    for start in range(0, len(prints), BLOCK):
        rows, columns = np.nonzero(alike(prints[start : start + BLOCK], prints[start:]) > above)
        rows, columns = rows + start, columns + start
        fits = (rows < columns) & (owner[rows] != owner[columns])
        found += list(zip(rows[fits].tolist(), columns[fits].tolist(), strict=True))
    return found

"""An explanation as a picture: images with their heat maps in a row each."""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from mmref.evaluate.plotting import own_style
from mmref.explain.explained_run import MAPS, Explanation
from mmref.explain.fonts import fonts_for

WIDTH = 42  # characters of a line above an image
MIN_SIDE = 200  # pixels that small images are enlarged to
HEADS = {
    "caption": "what the caption finds",
    "reference": "what the reference finds",
    "image": "what the image's feature rests on",
}


def draw(explanation: Explanation) -> bytes:
    """PNG: a row for each image, the image and one overlay for each feature that there is."""
    fonts, _ = fonts_for(written(explanation))
    with own_style(**{"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # who writes the picture says so once
        return _drawn(explanation)


def written(explanation: Explanation) -> str:
    """All that stands in the picture and comes from the data."""
    return headline(explanation, WIDTH) + "".join(f"{view.label}{view.note}" for view in explanation.views)


def _drawn(explanation: Explanation) -> bytes:
    names = [name for name in MAPS if name in explanation.views[0].heat]
    rows, columns = len(explanation.views), 1 + len(names)
    view = explanation.views[0]
    ratio = view.pixels.shape[0] / view.pixels.shape[1]
    figure = Figure(figsize=(2.5 * columns, (2.5 * ratio + 0.5) * rows + 0.6), layout="constrained")
    figure.suptitle(headline(explanation, width=28 * columns), fontsize=8.5, x=0.01, ha="left", parse_math=False)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for row, view in enumerate(explanation.views):
        picture = enlarged(view.pixels)
        _show(axes[row, 0], picture, "\n".join([*lines(view.label), *lines(view.note)]))
        for column, name in enumerate(names, 1):
            title = f"{HEADS[name]}\n" if row == 0 else ""
            _show(axes[row, column], overlay(picture, view.heat[name]), f"{title}cosine {view.cosine[name]:.2f}")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def lines(text: str) -> list[str]:
    """A text above an image, in at most two lines."""
    return textwrap.wrap(text, WIDTH, max_lines=2, placeholder=" …")


def headline(explanation: Explanation, width: int) -> str:
    """What is explained, by which reference, and what that says, in lines of `width` characters."""
    parts = [f"“{explanation.title}”" if explanation.kind == "query" else explanation.title]
    if explanation.reference:
        name = explanation.labels.get(explanation.reference, explanation.reference)
        parts.append(f"reference of {name}" + (f": “{explanation.read}”" if explanation.read else ""))
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


def _show(axes: Any, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title, fontsize=7.5, loc="left", parse_math=False)
    axes.axis("off")


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) in at least MIN_SIDE pixels on its shorter side."""
    scale = MIN_SIDE / min(pixels.shape[:2])
    if scale <= 1:
        return pixels
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC))


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 in grey, coloured where hiding it costs: its strength relative to the map's largest cost.

    Parts whose hiding makes the match better stay grey.
    """
    height, width = picture.shape[:2]
    cost = np.clip(heat, 0, None)
    cost = cost / max(float(cost.max()), 1e-12)
    smooth = np.clip(cv2.resize(cost.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    colour = cv2.applyColorMap(np.uint8(255 * smooth), cv2.COLORMAP_INFERNO)[..., ::-1]  # type: ignore[call-overload]
    grey = np.repeat(picture.mean(2, keepdims=True), 3, axis=2)
    share = 0.75 * smooth[..., None]
    return np.asarray((1 - share) * (0.35 * picture + 0.65 * grey) + share * colour, np.uint8)

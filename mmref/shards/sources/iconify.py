"""Icon sets in Iconify's JSON, npm packages `@iconify-json/NAME`: their icons as SVG documents and as pictures."""

from __future__ import annotations

import io
import os
import shutil
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mmref.errors import SampleError
from mmref.extras import need
from mmref.shards.sources import npm

BLANK_ABOVE = 244  # a drawing whose darkest channel value is above this does not show on white


@cache
def read_icons(package: str) -> dict[str, Any]:
    """icons.json of a package, parsed once in a process (the largest takes a second)."""
    data = npm.read_json(package, "icons.json")
    return {**data, "aliases": data.get("aliases", {})}


def icon_svg(data: dict[str, Any], icon: str) -> str:
    """A complete SVG document for an icon or alias of an icons.json. Sizes default to the set's; aliases may mirror."""
    alias = data["aliases"].get(icon, {})
    entry = {**data["icons"][alias.get("parent", icon)]}
    left, top = entry.get("left", data.get("left", 0)), entry.get("top", data.get("top", 0))
    width, height = entry.get("width", data.get("width", 16)), entry.get("height", data.get("height", 16))
    body = entry["body"]
    if bool(alias.get("hFlip")) != bool(entry.get("hFlip")):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'


def draw(package: str, icon: str, side: int) -> Image.Image:
    """RGB picture of an icon or alias of a package, (side, side) pixels, on white. Raises SampleError where nothing shows."""
    need("emoji", "drawing icons and emoji")
    import resvg_py

    svg = icon_svg(read_icons(package), icon)
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        raise SampleError(f"{read_icons(package)['prefix']}/{icon} cannot be rendered: {error}") from error
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if np.asarray(image).min() > BLANK_ABOVE:
        raise SampleError(f"{read_icons(package)['prefix']}/{icon} is blank")
    if image.size != (side, side):  # a drawing that is not square keeps its proportions, centred
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image


def webp(image: Image.Image, quality: int) -> bytes:
    """The picture as WebP of a quality, 1 to 100."""
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=quality, method=6)
    return encoded.getvalue()


def copy_licences(licences: str, root: str) -> None:
    """The licence texts of a folder to LICENSES/ of a set."""
    target = os.path.join(root, "LICENSES")
    os.makedirs(target, exist_ok=True)
    for name in sorted(os.listdir(licences)):
        shutil.copy(os.path.join(licences, name), target)

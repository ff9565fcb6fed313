"""Fonts of this machine that have the letters of a text: matplotlib's own has none for Chinese, say, and draws boxes."""

from __future__ import annotations

import contextlib
import functools

from matplotlib.font_manager import findSystemFonts, fontManager, get_font

OWN = "DejaVu Sans"  # comes with matplotlib
REGULAR = (400, "normal", "regular")
LAST_RESORT = "Last Resort"  # has a box for every letter


def fonts_for(text: str) -> tuple[list[str], str]:
    """Names of fonts that have the letters of a text between them, matplotlib's own first, and the letters that none here has."""
    missing = {letter for letter in text if letter.isprintable() and not letter.isspace()} - _letters(fontManager.findfont(OWN))
    names = [OWN]
    if missing:
        _look_again()
        for entry in sorted(
            fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.weight not in REGULAR, entry.name)
        ):
            if not entry.name.startswith(LAST_RESORT) and (found := missing & _letters(entry.fname)):
                missing -= found
                names.append(entry.name)
    return names, "".join(sorted(missing))


@functools.cache
def _look_again() -> None:
    """Have matplotlib know the fonts that were installed since it made its list."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            with contextlib.suppress(RuntimeError, OSError):  # one that it cannot read
                fontManager.addfont(path)


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """What a font has a shape for; nothing where it holds pictures, as those of emoji do."""
    try:
        return frozenset(map(chr, get_font(path).get_charmap()))
    except (RuntimeError, OSError):
        return frozenset()

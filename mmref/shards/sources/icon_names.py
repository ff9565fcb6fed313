"""Which object an icon of a set is a drawing of, by the icon's name there; and why some are of none.

Sets write one concept as `arrow-left`, `left-arrow`, `arrow-left-filled` or `arrow-left-24`. The object is the name without
words of style and size, its words in the order of the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STYLES = _words("outline outlined filled fill solid duotone twotone alt")  # of style, or of another drawing, in every set
# Words that some sets have for a style, and others for what is drawn (traffic light, bold text, round table).
STYLES_OF = {
    "clarity": ("line",),
    "famicons": ("sharp",),
    "fluent-mdl2": ("mirrored",),
    "garden": ("stroke",),
    "ion": ("sharp",),
    "lets-icons": ("light", "thin", "duotone-line", "line"),
    "majesticons": ("line",),
    "mdi": ("variant",),
    "nrk": ("active", "expressive"),
    "ooui": ("ltr", "rtl"),
    "pixelarticons": ("sharp",),
    "solar": ("minimalistic",),
    "stash": ("light",),
}
SIZE = re.compile(r"(?:10|12|14|15|16|20|24|28|32|36|40|48|64|96)(?:px)?$")
VARIANT = re.compile(r"0\d$")  # home-01, home-02: two drawings of one thing
BRAND_CATEGORY = re.compile(r"\b(?:brands?|logos?)\b", re.IGNORECASE)
BRAND_WORDS = _words("brand brands logo logos logotype")  # beside a brand's name
BRANDS = _words(  # that no set files as one
    """airplay airpods amex chromecast dropbox evernote excel facebook firefox gameboy github gitlab google imac instagram ios
    ipad iphone ipod lego linkedin macbook microsoft pacman pantone paypal pinterest playstation pokeball polaroid powerpoint
    reddit slack slideshare snapchat spotify stackoverflow tumblr twitter whatsapp wordpress xbox youtube"""
)
LETTER_WORDS = _words("letter letters alphabet alpha beta gamma delta theta lambda pi sigma omega")
DIGIT_WORDS = _words("number numbers numeric digit digits zero one two three four five six seven eight nine ten")
DIRECTIONS = _words("left right up down top bottom in out to from over on")


def words_of(name: str) -> list[str]:
    """The words of an icon's name."""
    return [word for word in name.lower().replace("_", "-").split("-") if word]


def styles_of(icon_set: str, metadata: Mapping[str, Any]) -> list[tuple[list[str], bool]]:
    """What a set adds to names for a style or a size, longest first: words, and whether they are put in front.

    Args:
        metadata: metadata.json of the set's package, {} where it has none.
    """
    found = {(tuple(words_of(text)), False) for text in (*metadata.get("suffixes", ()), *STYLES_OF.get(icon_set, ()), *STYLES)}
    found |= {(tuple(words_of(text)), True) for text in metadata.get("prefixes", ())}
    return [(list(words), front) for words, front in sorted(found, key=lambda style: (-len(style[0]), style)) if words]


def bare_words(name: str, styles: Sequence[tuple[list[str], bool]]) -> list[str]:
    """The words of a name without those of style and size; one word at least stays."""
    words, before = words_of(name), 0
    while len(words) != before:
        before = len(words)
        for style, front in styles:
            if len(words) > len(style) and (words[: len(style)] if front else words[-len(style) :]) == style:
                words = words[len(style) :] if front else words[: -len(style)]
        if len(words) > 1 and (SIZE.match(words[-1]) or VARIANT.match(words[-1])):
            words = words[:-1]
    return words


def object_of(words: Iterable[str]) -> str:
    """Id of the object that a name's words mean. Where several say a direction, their order says which is which."""
    words = list(words)
    ordered = words if len(DIRECTIONS.intersection(words)) > 1 else sorted(words)
    return "-".join(ordered)


def unfit(words: Sequence[str]) -> str:
    """Why an icon of such a name is no drawing of a thing; empty where it is one."""
    if (BRAND_WORDS | BRANDS).intersection(words):
        return "a brand"
    if words[0] == "flag" and len(words) == 2 and len(words[1]) == 2 and words[1] not in DIRECTIONS:
        return "the flag of a country"
    if DIGIT_WORDS.intersection(words) or any(character.isdigit() for word in words for character in word):
        return "a number"
    if LETTER_WORDS.intersection(words) or any(len(word) == 1 and word != "x" for word in words) or list(words) == ["x"]:
        return "a letter"
    return ""


def brands_of(metadata: Mapping[str, Any]) -> set[str]:
    """Icons that a set files among brands, by its metadata.json."""
    return {icon for name, icons in metadata.get("categories", {}).items() if BRAND_CATEGORY.search(name) for icon in icons}

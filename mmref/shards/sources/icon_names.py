"""Which object an icon of a set is a drawing of, by the icon's name there; and why some are of none.

Sets write one concept as `arrow-left`, `left-arrow`, `arrow-left-filled` or `arrow-left-24`. The object is the name without
words of style and size, its words in the order of the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLES = frozenset("outline outlined filled fill solid duotone twotone alt".split())  # of style, or of another drawing, in every set
# Words that some sets have for a style, and others for what is drawn (traffic light, bold text, round table).
STYLES_OF = {
    "basil": ("outline", "solid"),
    "garden": ("stroke",),
    "hugeicons": ("stroke", "rounded"),
    "iconmind": ("bold", "light", "thin", "line"),
    "ion": ("sharp",),
    "lets-icons": ("light", "duotone-line", "line", "thin", "duotone"),
    "proicons": ("filled",),
    "stash": ("light", "duotone", "solid"),
    "teenyicons": ("solid", "outline"),
}
SIZE = re.compile(r"(?:10|12|14|15|16|20|24|28|32|36|40|48|64|96)(?:px)?$")
VARIANT = re.compile(r"0\d$")  # home-01, home-02: two drawings of one thing
BRAND_CATEGORY = re.compile(r"\b(?:brands?|logos?)\b", re.IGNORECASE)
BRAND_WORDS = frozenset(("brand", "logo", "logos", "brands", "logotype"))
LETTER_WORDS = frozenset(("letter", "letters", "alpha", "alphabet", "number", "numbers", "numeric", "digit", "digits"))
DIGIT_WORDS = frozenset("zero one two three four five six seven eight nine ten".split())
DIRECTIONS = frozenset("left right up down top bottom in out to from over on".split())


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
    if BRAND_WORDS.intersection(words):
        return "a brand"
    if words[0] == "flag" and len(words) == 2 and len(words[1]) == 2:
        return "the flag of a country"
    if LETTER_WORDS.intersection(words) or any(len(word) == 1 and word != "x" for word in words) or list(words) == ["x"]:
        return "a letter"
    if DIGIT_WORDS.intersection(words) or any(character.isdigit() for word in words for character in word):
        return "a number"
    return ""


def brands_of(metadata: Mapping[str, Any]) -> set[str]:
    """Icons that a set files among brands."""
    return {icon for name, icons in metadata.get("categories", {}).items() if BRAND_CATEGORY.search(name) for icon in icons}

"""Which drawing of which artist set shows which emoji, and what people call that emoji.

Three sets list code points (`chars.json`); in the others an icon is found by its name: first among the names that the
listing sets use, then among the standard and colloquial names, then among Unicode character names.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from mmref.shards.sources.npm import read_json

SHORTCODES = ("cldr", "joypixels", "github", "iamcal")
FLAG_PREFIX = re.compile(r"^flag[- :]+(for[- ])?(flag[- ])?")  # "flag: X", "flag-for-X", "flag-for-flag-X" are one name
ID = re.compile(r'(?<=\bid=")[^"]*|(?<=url\(#)[^)]*|(?<=href="#)[^"]*')  # differ between copies of a picture
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}


@dataclass(frozen=True)
class Emoji:
    """One object: its text in the standard and in the vendors' keyword lists."""

    code: str  # "1f44b-1f3fb": hexadecimal code points without the variation selector
    text: str  # the characters
    group: str
    standard: str
    keywords: list[str]  # CLDR
    tags: list[str]  # short codes and other vendors' keywords that CLDR does not have


@dataclass(frozen=True)
class Drawing:
    """One artist's icon of one emoji: the icon's own name in its set."""

    artist_set: str
    icon: str


def normal_code(code: str) -> str:
    """Lower case, without the variation selector FE0F, which changes no drawing."""
    return "-".join(part for part in re.split(r"[-_ ]", code.lower()) if part != "fe0f")


def squash(name: str) -> str:
    """Letters and digits alone, lower case and without accents: sets differ in the rest."""
    plain = unicodedata.normalize("NFKD", FLAG_PREFIX.sub("flag", name.lower()))
    return "".join(c for c in plain if c.isascii() and c.isalnum())


def _unique(words: list[str]) -> list[str]:
    return list(dict.fromkeys(word for word in words if word))


def _with_tones(words: list[str], tones: list[str]) -> list[str]:
    return _unique([*words, *tones]) if words else []  # a tone alone would describe hundreds of emoji


def _shortcodes(package: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for vendor in SHORTCODES:
        for code, names in read_json(package, "en", "shortcodes", f"{vendor}.json").items():
            names = [names] if isinstance(names, str) else names
            found.setdefault(normal_code(code), []).extend(name.replace("_", " ").strip() for name in names)
    return found


def read_emoji(emojibase: str, cldr: str) -> dict[str, Emoji]:
    """Every emoji of the standard by code. A skin-tone variant takes its base's keywords and the tone, as in CLDR."""
    groups = {g["order"]: g["message"] for g in read_json(emojibase, "en", "messages.json")["groups"]}
    notes = read_json(cldr, "annotations", "en", "annotations.json")["annotations"]["annotations"]
    short = _shortcodes(emojibase)
    found: dict[str, Emoji] = {}
    for base in read_json(emojibase, "en", "data.json"):
        if "group" not in base:
            continue  # lone regional indicators: halves of flags, not emoji
        base_note = notes.get(base["emoji"].replace("\ufe0f", ""), {})
        for entry in [base, *base.get("skins", [])]:
            code = normal_code(entry["hexcode"])
            note = notes.get(entry["emoji"].replace("\ufe0f", ""), {})
            tones = [f"{TONES[ord(c)]} skin tone" for c in entry["emoji"] if ord(c) in TONES and entry is not base]
            keywords = _with_tones((note or base_note).get("default", []), tones)
            standard = (note.get("tts") or [entry["label"]])[0]
            # Short codes of variants say "tone1": the base's, with the tone in words, say the same in English.
            colloquial = [*short.get(normal_code(base["hexcode"]), []), *base.get("tags", [])]
            tags = [tag for tag in _unique(colloquial) if tag not in keywords and tag != standard and tag not in tones]
            group, tags = groups[base["group"]], _with_tones(tags, tones)
            found[code] = Emoji(code, entry["emoji"], group, standard, keywords, tags)
    return found


def name_tables(emoji: dict[str, Emoji], emojibase: str, sets: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Tables squashed name -> code, most trusted first. A name that means two emoji in one table is left out of it."""
    listed: dict[str, set[str]] = {}
    for data in sets.values():
        codes = {name: normal_code(code) for code, name in data["chars"].items()}
        for alias, entry in data["aliases"].items():
            if "hFlip" not in entry and entry["parent"] in codes:  # a flipped alias is another emoji
                codes.setdefault(alias, codes[entry["parent"]])
        for name, code in codes.items():
            listed.setdefault(squash(name), set()).add(code)
    standard: dict[str, set[str]] = {}
    colloquial: dict[str, set[str]] = {}
    character: dict[str, set[str]] = {}
    for code, item in emoji.items():
        standard.setdefault(squash(item.standard), set()).add(code)
        points = [int(part, 16) for part in code.split("-")]
        if len(points) == 1:
            character.setdefault(squash(unicodedata.name(chr(points[0]), "")), set()).add(code)
    for code, names in _shortcodes(emojibase).items():
        for name in names:
            colloquial.setdefault(squash(name), set()).add(code)
    tables = (listed, standard, colloquial, character)
    return [{name: min(codes) for name, codes in table.items() if name and len(codes) == 1} for table in tables]


# Drawings filed under a name that another emoji has: a ribbon, water, and a woman's face.
MISFILED = {("fxemoji", "bow"), ("fxemoji", "wave"), ("fxemoji", "pout")}


def find_drawings(emoji: dict[str, Emoji], emojibase: str, sets: dict[str, dict[str, Any]]) -> dict[str, list[Drawing]]:
    """Drawings of each emoji, at most one per set. `sets`: name -> {icons, aliases, chars} of its package.

    An icon shows one emoji only; an alias counts when it is flipped, which makes it another drawing.
    """
    tables = name_tables(emoji, emojibase, sets)
    drawings: dict[str, list[Drawing]] = {code: [] for code in emoji}
    for artist_set, data in sets.items():
        own = {name: normal_code(code) for code, name in data["chars"].items()}
        icons = {**data["icons"], **{a: entry for a, entry in data["aliases"].items() if "hFlip" in entry}}
        # Icons that the set still shows come before hidden ones, which are older drawings; then in order of names.
        for icon in sorted(icons, key=lambda name: (bool(icons[name].get("hidden")), name)):
            aliases = [a for a, entry in data["aliases"].items() if entry["parent"] == icon and "hFlip" not in entry]
            names = [icon, *aliases]
            candidates = [own.get(icon)] + [table.get(squash(name)) for table in tables for name in names]
            code = next((c for c in candidates if c in drawings), None)
            if (artist_set, icon) in MISFILED:
                continue
            if code and all(drawing.artist_set != artist_set for drawing in drawings[code]):
                drawings[code].append(Drawing(artist_set, icon))
    return _without_shared(drawings, sets)


def _without_shared(drawings: dict[str, list[Drawing]], sets: dict[str, dict[str, Any]]) -> dict[str, list[Drawing]]:
    """Some teams use one picture for several emoji (man and person biking, most families): it cannot tell them apart,
    and would lie in train and test. It stays with the base emoji, the one with fewest code points, if there is one."""
    users: dict[tuple, list[str]] = {}
    pictures: dict[Drawing, tuple] = {}
    for code, found in drawings.items():
        for drawing in found:
            alias = sets[drawing.artist_set]["aliases"].get(drawing.icon, {})
            body = sets[drawing.artist_set]["icons"][alias.get("parent", drawing.icon)]["body"]
            pictures[drawing] = (drawing.artist_set, ID.sub("", body), alias.get("hFlip", False))
            users.setdefault(pictures[drawing], []).append(code)
    owner = {}
    for picture, codes in users.items():
        lengths = sorted(code.count("-") for code in codes)
        if len(codes) == 1 or lengths[0] < lengths[1]:
            owner[picture] = min(codes, key=lambda code: code.count("-"))
    return {code: [d for d in found if owner.get(pictures[d]) == code] for code, found in drawings.items()}

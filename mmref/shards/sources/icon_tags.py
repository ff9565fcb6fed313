"""Tags that authors of icon sets ship in packages of their own, each in its own layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mmref.errors import SourceError
from mmref.shards.sources.icon_names import STYLES, bare_words, words_of
from mmref.shards.sources.npm import read_json

PHOSPHOR_ICON = re.compile(r'\bname: ("[^"]+"),.*?\btags: (\[[^\]]*\])', re.DOTALL)
NO_TAGS = STYLES | {"sharp", "new", "alternate"}  # what packages say among the tags of an icon's style and age


def read_tags(package: str, folder: str, styles: list[tuple[list[str], bool]]) -> dict[str, list[str]]:
    """Tags of each icon, by its name without words of style.

    Args:
        package: its name.
        folder: where it is unpacked.
        styles: of the set that the tags are for, see `styles_of`.

    Raises SourceError where the package is not as expected.
    """
    found: dict[str, dict[str, None]] = {}
    try:
        for name, tags in READERS[package](folder):
            words = bare_words(name, styles)
            known = found.setdefault("-".join(words), {})
            for tag in tags:
                text = " ".join(bare_words(tag.replace(" ", "-"), styles)) if words_of(tag) else ""
                if any(map(str.isalpha, text)) and text not in NO_TAGS and text != " ".join(words):
                    known[text] = None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{package} in {folder} has tags in another layout than expected: {error!r}.") from error
    return {name: list(tags) for name, tags in found.items() if tags}


Tagged = Iterable[tuple[str, list[str]]]


def _carbon(folder: str) -> Tagged:
    return [(icon["name"], icon.get("aliases", [])) for icon in read_json(folder, "metadata.json")["icons"]]


def _codicons(folder: str) -> Tagged:
    return [(name, icon.get("tags", [])) for name, icon in read_json(folder, "dist", "metadata.json").items()]


def _font_awesome(folder: str) -> Tagged:
    icons = read_json(folder, "metadata", "icon-families.json")
    return [(name, list(map(str, icon["search"]["terms"]))) for name, icon in icons.items()]


def _gravity(folder: str) -> Tagged:
    return [(icon["name"], icon["keywords"]) for icon in read_json(folder, "metadata.json")["icons"]]


def _ionicons(folder: str) -> Tagged:
    return [(icon["name"], icon["tags"]) for icon in read_json(folder, "dist", "ionicons.json")["icons"]]


def _lucide(folder: str) -> Tagged:
    return list(read_json(folder, "tags.json").items())


def _mdi(folder: str) -> Iterator[tuple[str, list[str]]]:
    for icon in read_json(folder, "meta.json"):
        groups = [part.strip() for tag in icon["tags"] for part in re.split("[/+]", tag)]  # "Account / User"
        yield icon["name"], [*icon["aliases"], *groups]


def _octicons(folder: str) -> Tagged:
    return [(name, icon["keywords"]) for name, icon in read_json(folder, "build", "data.json").items()]


def _phosphor(folder: str) -> Tagged:
    path = os.path.join(folder, "dist", "index.mjs")  # a list of literals; the package has no JSON
    try:
        with open(path, encoding="utf-8") as file:
            found = PHOSPHOR_ICON.findall(file.read())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}. Delete the package folder to fetch it again.") from error
    return [(json.loads(name), [tag for tag in json.loads(tags) if not tag.startswith("*")]) for name, tags in found]


def _tabler(folder: str) -> Tagged:
    return [(name, list(map(str, icon["tags"]))) for name, icon in read_json(folder, "icons.json").items()]


READERS: dict[str, Any] = {
    "@carbon/icons": _carbon,
    "@vscode/codicons": _codicons,
    "@fortawesome/fontawesome-free": _font_awesome,
    "@gravity-ui/icons": _gravity,
    "ionicons": _ionicons,
    "lucide-static": _lucide,
    "@mdi/svg": _mdi,
    "@primer/octicons": _octicons,
    "@phosphor-icons/core": _phosphor,
    "@tabler/icons": _tabler,
}

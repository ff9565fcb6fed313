"""The bundled set: emoji drawn by seven artist teams, with the names and keywords of several vendors.

An object is an emoji (a code point sequence); its images are the teams' drawings of it, its captions the
drawing's own name in its set, the standard name, and keyword lists: ambiguous, incomplete and contradicting by nature.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

from mmref.config.shipped import shipped
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, hash_split
from mmref.shards.sources import npm
from mmref.shards.sources.emoji_names import Drawing, Emoji, find_drawings, read_emoji
from mmref.shards.sources.iconify import copy_licences, draw, read_icons, webp

ARTIST_SETS = {  # set -> npm package, pinned version. Share-alike sets are left out on purpose.
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "fluent-emoji": ("@iconify-json/fluent-emoji", "1.2.7"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
}
TEXT = {"emojibase": ("emojibase-data", "17.0.0"), "cldr": ("cldr-annotations-full", "48.2.0")}
LICENSES = shipped("data_shards/emoji/LICENSES")

TEXT_VERSIONS = {name: version for name, (_, version) in TEXT.items()}
README = """# Emoji drawings by seven teams

A shard set of MMRef: each object is an emoji, its images are the drawings of different artist teams, its captions the
names and keywords of different vendors. Rendered at {size} px on white (WebP, quality {quality}); otherwise unchanged.
`mmref shards build emoji --out DIR` makes it again from the packages below; `mmref shards verify DIR` checks it.
Shards travel as `.tar.gz` and are unpacked beside it on first use.

| set | drawings | licence | package |
|---|---|---|---|
{sets}

| text | licence | package |
|---|---|---|
| standard names, short codes, tags: Emojibase, Miles Johnson | MIT | `emojibase-data` {emojibase} |
| standard names, keywords: Unicode CLDR, English annotations | Unicode-3.0 | `cldr-annotations-full` {cldr} |

Licence texts are in `LICENSES/`. A sample's `set` says which team drew it, so which licence its image is under.
Kinds of captions: `standard` (the full name), `name` (the drawing's name in its set, where it
differs), `keywords` (CLDR), `tags` (short codes and
other keywords). Splits are by object: 70 % train, 10 % val, 20 % test, by a fixed hash of the object id. Variants (skin
tone, gender) are objects of their own.
"""


@cache
def _icons(package: str) -> dict[str, Any]:
    return {**read_icons(package), "chars": npm.read_json(package, "chars.json")}


class EmojiSource:
    """`packages`: folder with the unpacked npm packages (`<name>-<version>/package`); None fetches them with npm."""

    name = "emoji"
    licence = "CC-BY-4.0, Apache-2.0 and MIT (drawings, by set); MIT and Unicode-3.0 (text): see LICENSES/"
    min_images = 3
    extras = ("README.md", *(f"LICENSES/{name}" for name in sorted(os.listdir(LICENSES))))

    def __init__(self, packages: str | None = None, size_px: int = 64, quality: int = 72, sets: list[str] | None = None) -> None:
        """size_px: side of the square image; quality: WebP, 1-100; sets: artist sets to use, all when None."""
        self.size_px, self.quality, self.skipped = size_px, quality, list[str]()
        cache_dir = os.path.abspath(packages or npm.default_cache())  # workers may run in another directory
        wanted = {name: ARTIST_SETS[name] for name in sets or ARTIST_SETS}
        self.folders = {name: npm.fetch(*pinned, cache_dir) for name, pinned in wanted.items()}
        self.text = {name: npm.fetch(*pinned, cache_dir) for name, pinned in TEXT.items()}
        self.origin = ", ".join(f"{package}@{version}" for package, version in [*wanted.values(), *TEXT.values()])

    def objects(self) -> Iterable[SourceObject]:
        emoji = read_emoji(self.text["emojibase"], self.text["cldr"])
        sets = {name: _icons(folder) for name, folder in self.folders.items()}
        for code, drawings in find_drawings(emoji, self.text["emojibase"], sets).items():
            if len(drawings) >= self.min_images:
                images = [self._image(emoji[code], drawing) for drawing in drawings]
                yield SourceObject(hash_split(code, DEFAULT_FRACTIONS), code, images)

    @staticmethod
    def _image(emoji: Emoji, drawing: Drawing) -> SourceImage:
        captions: dict[str, str] = {}
        for text, kind in (
            (emoji.standard, "standard"),  # first: the full name of an emoji is `standard` where its set agrees, too
            (drawing.icon.replace("-", " "), "name"),
            (", ".join(emoji.keywords), "keywords"),
            (", ".join(emoji.tags), "tags"),
        ):
            if text:
                captions.setdefault(text, kind)  # an exact duplicate keeps its first kind
        return SourceImage(
            image_id=f"{emoji.code}_{drawing.artist_set}",
            ref=(drawing.artist_set, drawing.icon),
            captions=list(captions),
            caption_kinds=list(captions.values()),
            extra={"set": drawing.artist_set, "emoji": emoji.text, "group": emoji.group},
        )

    def load(self, ref: tuple[str, str]) -> bytes:
        """WebP of (set, icon), size_px square, on white. Raises SampleError for a drawing that does not show."""
        artist_set, icon = ref
        return webp(draw(self.folders[artist_set], icon, self.size_px), self.quality)

    def write_extras(self, root: str) -> None:
        """LICENSES/ and README.md with the attribution of every set."""
        copy_licences(LICENSES, root)
        lines = []
        for artist_set, folder in self.folders.items():
            info = npm.read_json(folder, "info.json")
            author, licence = info["author"], info["license"]
            package, version = ARTIST_SETS[artist_set]
            lines.append(
                f"| {artist_set} | {info['name']} by [{author['name']}]({author['url']}) "
                f"| [{licence['title']}]({licence['url']}) | `{package}` {version} |"
            )
        with open(os.path.join(root, "README.md"), "w", encoding="utf-8") as file:
            file.write(README.format(sets="\n".join(lines), size=self.size_px, quality=self.quality, **TEXT_VERSIONS))

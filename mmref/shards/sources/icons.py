"""Icons: things drawn by many open icon sets, with each set's own name for them, and its tags.

An object is what at least four teams of artists draw under one name; its images are the drawings, one of a set. Letters,
numbers, brands and flags are left out, and what is a copy of another drawing.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmref.config.shipped import shipped
from mmref.errors import SampleError, SourceError
from mmref.extras import need
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, hash_fraction, hash_split
from mmref.shards.sources import icon_names, npm
from mmref.shards.sources.icon_copies import Prints, copies, join, prints_of, shared
from mmref.shards.sources.icon_sets import ICON_SETS, TAGS
from mmref.shards.sources.icon_tags import read_tags
from mmref.shards.sources.iconify import copy_licences, draw, read_icons, webp

MIN_FAMILIES = 4  # teams that draw an object
COPY_ABOVE = 0.97  # correlation of two drawings of an object from which one is a copy of the other
SHARED_ABOVE = 0.99  # the same of drawings of two objects
PRINT_FROM_PX = 64  # side of the picture that a print is taken of, whatever the side of the set's images
FETCHES = 4  # packages at a time
LICENSES = shipped("data_shards/icons/LICENSES")
README = """# Icons of {n_sets} open sets

A shard set of MMRef: each object is a thing that at least {families} teams of artists draw under one name, its images are
their drawings, its captions the sets' own names and tags. Rendered at {size} px on white (WebP, quality {quality});
otherwise unchanged. `mmref shards build icons --out DIR` makes it again from the packages below; `mmref shards verify DIR`
checks it.

| set | drawings | licence | package |
|---|---|---|---|
{sets}

| tags of | licence | package |
|---|---|---|
{tags}

`LICENSES/` has the texts of the licences, or where they are found. A sample's `set` says which set drew it, so which
licence its image is under; the sets' authors hold the copyright. Kinds of captions: `name` (the icon's name in its set,
without words of style and size) and `tags`. Splits are by object: 70 % train, 10 % val, 20 % test, by a fixed hash of the
object id. `left_out.jsonl` says what was left out and why.
"""


@dataclass(frozen=True)
class Drawing:
    """An icon of a set, and the words of its name there that mean what it shows."""

    icon_set: str
    icon: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.icon_set}/{self.icon}"


class IconSource:
    """`packages`: folder with the unpacked npm packages (`<name>-<version>/package`); None fetches them with npm."""

    name = "icons"
    licence = "MIT, ISC, Apache-2.0, CC-BY-4.0, CC-BY-3.0, OFL-1.1, CC0-1.0 and Unlicense, by set: see README.md and LICENSES/"
    min_images = MIN_FAMILIES
    extras = ("README.md", *(f"LICENSES/{name}" for name in sorted(os.listdir(LICENSES))))

    def __init__(self, packages: str | None = None, size_px: int = 64, quality: int = 72, sets: list[str] | None = None) -> None:
        """size_px: side of the square image; quality: WebP, 1-100; sets: icon sets to use, all when None."""
        need("emoji", "the source of icons")  # before anything is fetched
        self.size_px, self.quality, self.skipped = size_px, quality, list[str]()
        self.sets = list(ICON_SETS if sets is None else sets)
        self.tags = [name for name, tags in TAGS.items() if set(tags.sets) & set(self.sets)]
        cache_dir = os.path.abspath(packages or npm.default_cache())  # workers may run in another directory
        pinned = [(f"@iconify-json/{name}", ICON_SETS[name].package) for name in self.sets]
        pinned += [(name, TAGS[name].package) for name in self.tags]
        with ThreadPoolExecutor(FETCHES) as pool:
            fetched = pool.map(lambda item: npm.fetch(item[0], item[1].version, cache_dir, item[1].sha256), pinned)
            self.folders = dict(zip([*self.sets, *self.tags], fetched, strict=True))
        self.origin = f"{len(self.sets)} icon sets and tags of {len(self.tags)} from npm; README.md has the packages and versions"

    def objects(self) -> Iterable[SourceObject]:
        """Raises SourceError where a package is not what it is known as."""
        metadata = {name: self._metadata(name) for name in self.sets}
        styles = {name: icon_names.styles_of(name, metadata[name]) for name in self.sets}
        tags: dict[str, dict[str, list[str]]] = {}
        for package in self.tags:
            for name in TAGS[package].sets:
                tags[name] = read_tags(package, self.folders[package], styles[name])
        chosen = self._chosen(self._named(metadata, styles), first=list(tags))
        for name, drawings in sorted(self._without_copies(chosen).items()):
            if self._drawn_by_enough(name, drawings):
                images = [self._image(name, drawing, tags.get(drawing.icon_set, {})) for drawing in drawings]
                yield SourceObject(hash_split(name, DEFAULT_FRACTIONS), name, images)

    def _metadata(self, icon_set: str) -> dict[str, Any]:
        """metadata.json of a set, {} where it has none. Raises SourceError where its licence is not the one that is known."""
        folder, known = self.folders[icon_set], ICON_SETS[icon_set].licence
        found = npm.read_json(folder, "info.json")["license"].get("spdx")
        if found != known:
            raise SourceError(f"{folder}/info.json says that its licence is {found}, expected {known}: it is another package.")
        path = os.path.join(folder, "metadata.json")
        return dict(npm.read_json(folder, "metadata.json")) if os.path.exists(path) else {}

    def _named(self, metadata: dict[str, dict[str, Any]], styles: dict[str, Any]) -> dict[str, list[Drawing]]:
        """Icons by the object that their names mean. Icons that a set has withdrawn (hidden) are passed over."""
        found: dict[str, list[Drawing]] = defaultdict(list)
        brands: dict[str, str] = {}
        for name in self.sets:
            filed = icon_names.brands_of(metadata[name])
            for icon, entry in sorted(read_icons(self.folders[name])["icons"].items()):
                if entry.get("hidden"):
                    continue
                drawing = Drawing(name, icon, tuple(icon_names.bare_words(icon, styles[name])))
                reason = "a brand" if icon in filed else icon_names.unfit(drawing.words)
                if reason:
                    self.skipped.append(f"{drawing}: {reason}")
                else:
                    found[icon_names.object_of(drawing.words)].append(drawing)
                if reason == "a brand":
                    plain = [word for word in drawing.words if word not in icon_names.BRAND_WORDS]
                    brands.setdefault(icon_names.object_of(plain), str(drawing))
        for name in sorted(brands.keys() & found.keys()):
            self.skipped.append(f"object {name}: a brand as {brands[name]}")
        return self._in_one_spelling({name: found[name] for name in sorted(found.keys() - brands.keys())})

    @staticmethod
    def _in_one_spelling(named: dict[str, list[Drawing]]) -> dict[str, list[Drawing]]:
        """`logout` and `log-out` are one object, with the id that more drawings have."""
        spelled = {drawing.words: name for name, drawings in named.items() for drawing in drawings if len(drawing.words) > 1}
        for words, name in sorted(spelled.items()):
            one = "".join(words)
            if one in named and name in named:
                kept, gone = sorted((one, name), key=lambda each: (-len(named[each]), each))
                named[kept] = named[kept] + named.pop(gone)
        return named

    def _chosen(self, named: dict[str, list[Drawing]], first: list[str]) -> dict[str, list[Drawing]]:
        """Of objects that enough teams draw, one drawing of each set, those of the sets in `first` in front.

        Where a set has it in several styles, a fixed hash takes one, so that no style is the rule.
        """
        order = {name: i for i, name in enumerate(dict.fromkeys([*first, *self.sets]))}
        chosen: dict[str, list[Drawing]] = {}
        for name, drawings in named.items():
            if not self._drawn_by_enough(name, drawings):
                continue
            taken: dict[str, Drawing] = {}
            for drawing in sorted(drawings, key=lambda item: hash_fraction(str(item))):
                if taken.setdefault(drawing.icon_set, drawing) is not drawing:
                    self.skipped.append(f"{drawing}: another style of {taken[drawing.icon_set]}")
            chosen[name] = sorted(taken.values(), key=lambda item: order[item.icon_set])
        return chosen

    def _drawn_by_enough(self, name: str, drawings: list[Drawing]) -> bool:
        teams = len({ICON_SETS[drawing.icon_set].family for drawing in drawings})
        if teams < MIN_FAMILIES:
            self.skipped.append(f"object {name}: drawn by {teams} of the teams, fewer than {MIN_FAMILIES}")
        return teams >= MIN_FAMILIES

    def _without_copies(self, chosen: dict[str, list[Drawing]]) -> dict[str, list[Drawing]]:
        """Drawings that can be drawn and are no copy of another one of their object. One that two objects have cannot tell them
        apart, and might lie in train and test: it stays with the object of more drawings."""
        kept: list[tuple[str, Drawing]] = []
        prints: list[Prints] = []
        for name, drawings in chosen.items():
            shown, found = self._prints(drawings)
            double = dict(copies(found, COPY_ABOVE))
            self.skipped += [f"{shown[i]}: a copy of {shown[k]}" for i, k in double.items()]
            single = [i for i in range(len(shown)) if i not in double]
            kept += [(name, shown[i]) for i in single]
            prints.append(found[single])
        names = list(chosen)
        numbers = {name: i for i, name in enumerate(names)}
        owners = [numbers[name] for name, _ in kept]
        sizes = np.bincount(owners, minlength=len(names))
        gone: set[int] = set()
        for pair in shared(join(prints), owners, SHARED_ABOVE):
            if not gone.intersection(pair):
                less, more = sorted(pair, key=lambda i: (sizes[owners[i]], -owners[i]))
                gone.add(less)
                self.skipped.append(f"{kept[less][1]}: a copy of {kept[more][1]}, which shows {kept[more][0]}")
        left: dict[str, list[Drawing]] = {name: [] for name in names}
        for i, (name, drawing) in enumerate(kept):
            if i not in gone:
                left[name].append(drawing)
        return left

    def _prints(self, drawings: list[Drawing]) -> tuple[list[Drawing], Prints]:
        """Drawings that show something, and their prints."""
        shown, pictures = [], []
        for drawing in drawings:
            try:
                pictures.append(draw(self.folders[drawing.icon_set], drawing.icon, PRINT_FROM_PX))
            except SampleError as error:
                self.skipped.append(str(error))
            else:
                shown.append(drawing)
        return shown, prints_of(pictures)

    @staticmethod
    def _image(name: str, drawing: Drawing, tags: dict[str, list[str]]) -> SourceImage:
        captions = {" ".join(drawing.words): "name"}
        if found := tags.get("-".join(drawing.words)):
            captions.setdefault(", ".join(found), "tags")
        return SourceImage(
            image_id=f"{name}_{drawing.icon_set}",
            ref=(drawing.icon_set, drawing.icon),
            captions=list(captions),
            caption_kinds=list(captions.values()),
            extra={"set": drawing.icon_set, "icon": drawing.icon},
        )

    def load(self, ref: tuple[str, str]) -> bytes:
        """WebP of (set, icon), size_px square, on white. Raises SampleError for a drawing that does not show."""
        icon_set, icon = ref
        return webp(draw(self.folders[icon_set], icon, self.size_px), self.quality)

    def write_extras(self, root: str) -> None:
        """LICENSES/ and README.md with the attribution of every set."""
        copy_licences(LICENSES, root)
        sets = []
        for name in self.sets:
            info, known = npm.read_json(self.folders[name], "info.json"), ICON_SETS[name]
            author, licence = info["author"], info["license"]
            sets.append(
                f"| {name} | {info['name']} by {_link(author['name'], author)} | {_link(known.licence, licence)} "
                f"| `@iconify-json/{name}` {known.package.version}, sha256 {known.package.sha256} |"
            )
        tags = [
            f"| {', '.join(TAGS[name].sets)} | {TAGS[name].licence} "
            f"| `{name}` {TAGS[name].package.version}, sha256 {TAGS[name].package.sha256} |"
            for name in self.tags
        ]
        text = README.format(
            n_sets=len(self.sets), families=MIN_FAMILIES, size=self.size_px, quality=self.quality,
            sets="\n".join(sets), tags="\n".join(tags),
        )  # fmt: skip
        with open(os.path.join(root, "README.md"), "w", encoding="utf-8") as file:
            file.write(text)


def _link(text: str, place: dict[str, str]) -> str:
    """Markdown: a link where a package gives one."""
    return f"[{text}]({place['url']})" if place.get("url") else text

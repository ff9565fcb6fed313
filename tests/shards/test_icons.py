"""The source of icons on packages made here: which names are one object, what is left out and why, tags, licences."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.left_out import kind_of
from mmref.shards.samples import DEFAULT_FRACTIONS, hash_split
from mmref.shards.sources import npm
from mmref.shards.sources.icon_copies import BLOCK, alike, copies, join, prints_of, shared
from mmref.shards.sources.icon_names import STYLES_OF, bare_words, object_of, styles_of, unfit
from mmref.shards.sources.icon_sets import ICON_SETS, TAGS
from mmref.shards.sources.icon_tags import READERS, read_tags
from mmref.shards.sources.icons import LICENSES, IconSource

SETS = ["lucide", "ri", "bi", "carbon", "uil", "uis"]  # uil and uis are of one team
PLAIN = ["lucide", "ri", "bi", "uil"]


def body(name: str) -> str:
    """Nine squares, of which a hash of the name leaves some out and makes others small."""
    digest = hashlib.sha256(name.encode()).digest()
    cells = [(x, y, digest[3 * x + y] % 8) for x in range(3) for y in range(3)]
    return "".join(f'<path d="M{8 * x} {8 * y}h{size}v{size}h-{size}z"/>' for x, y, size in cells if size)


def write(root: Path, package: str, version: str, files: dict[str, Any]) -> Path:
    folder = root / npm.folder_name(package, version) / "package"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> str:
    """Folder of tiny packages. Every set but one draws a house, and each says so in another way."""
    pytest.importorskip("resvg_py")
    names = {
        "lucide": ["home", "arrow-left", "square-a", "apple", "log-out", "x", "star"],
        "ri": ["home-line", "home-fill", "left-arrow-line", "dice-5-line", "apple-fill", "logout-line", "star-line"],
        "bi": ["home-24", "arrow-left", "brand-apple", "rare", "logout", "star"],
        "carbon": ["home", "arrow--left", "apple", "log-out"],
        "uil": ["home-alt", "left-arrow", "apple", "rare", "log-out", "star"],
        "uis": ["home", "rare", "star"],
    }
    metadata = {"ri": {"suffixes": {"line": "Line", "fill": "Fill"}}, "uil": {"categories": {"Brand Logos": ["apple"]}}}
    for name, icons in names.items():
        known = ICON_SETS[name]
        data = {"prefix": name, "width": 24, "height": 24, "icons": {icon: {"body": body(f"{name} {icon}")} for icon in icons}}
        data["icons"]["gone"] = {"body": body("gone"), "hidden": True}
        if name == "bi":  # a copy of another set's, at half the size; a drawing that does not show
            data["icons"]["home-24"] = {"body": f'<g transform="scale(2)">{body("lucide home")}</g>', "width": 48, "height": 48}
            data["icons"]["star"] = {"body": "<g/>"}
        files: dict[str, Any] = {
            "icons.json": data, "metadata.json": metadata.get(name, {}),
            "info.json": {
                "name": name.upper(), "author": {"name": f"team of {name}", "url": f"https://{name}.example"},
                "license": {"title": known.licence, "spdx": known.licence, "url": f"https://{name}.example/licence"},
            },
        }  # fmt: skip
        if name == "uil":
            del files["info.json"]["license"]["url"]
        write(tmp_path, f"@iconify-json/{name}", known.package.version, files)
    write(tmp_path, "lucide-static", TAGS["lucide-static"].package.version, {"tags.json": {"home": ["living", "House", "home"]}})
    carbon = {"icons": [{"name": "arrow--left", "aliases": ["back"]}, {"name": "home"}]}
    write(tmp_path, "@carbon/icons", TAGS["@carbon/icons"].package.version, {"metadata.json": carbon})
    return str(tmp_path)


def test_objects_and_captions(packages: str) -> None:
    source = IconSource(packages, sets=SETS)
    found = {item.object_id: item for item in source.objects()}
    assert list(found) == ["arrow-left", "home", "log-out"]
    assert all(item.split == hash_split(name, DEFAULT_FRACTIONS) for name, item in found.items())
    home = {image.extra["set"]: image for image in found["home"].images}
    assert list(home) == ["carbon", "lucide", "ri", "uil", "uis"], "sets with tags first; a copy is left out"
    assert dict(zip(home["lucide"].caption_kinds or [], home["lucide"].captions, strict=True)) == {
        "name": "home", "tags": "living, house",
    }  # fmt: skip
    assert home["ri"].extra["icon"] in ("home-line", "home-fill") and home["ri"].captions == ["home"]
    arrow = {image.extra["set"]: image.captions for image in found["arrow-left"].images}
    assert arrow == {
        "lucide": ["arrow left"], "carbon": ["arrow left", "back"], "ri": ["left arrow"], "bi": ["arrow left"],
        "uil": ["left arrow"],
    }  # fmt: skip
    assert {image.captions[0] for image in found["log-out"].images} == {"log out", "logout"}, "the id that more drawings have"
    assert len({image.image_id for item in found.values() for image in item.images}) == 15


def test_what_is_left_out_and_why(packages: str) -> None:
    source = IconSource(packages, sets=SETS)
    list(source.objects())
    style = next(line for line in source.skipped if "style" in line)
    assert style in (f"ri/home-{a}: another style of ri/home-{b}" for a, b in (("line", "fill"), ("fill", "line")))
    assert sorted(line for line in source.skipped if "style" not in line) == [
        "bi/brand-apple: a brand",
        "bi/home-24: a copy of lucide/home",
        "bi/star is blank",
        "lucide/square-a: a letter",
        "lucide/x: a letter",
        "object apple: a brand as bi/brand-apple",
        "object rare: drawn by 2 of the teams, fewer than 4",
        "object star: drawn by 3 of the teams, fewer than 4",
        "ri/dice-5-line: a number",
        "uil/apple: a brand",
    ]
    assert {kind_of(line) for line in source.skipped} == {
        "another style", "a copy", "blank", "drawn by too few teams", "a brand, letter, number or flag",
    }  # fmt: skip


def test_one_drawing_of_two_objects_stays_with_the_object_of_more(packages: str) -> None:
    for name in PLAIN:
        (path,) = Path(packages).glob(f"iconify-json-{name}-*/package/icons.json")
        data = json.loads(path.read_text())
        icon = "trash-line" if name == "ri" else "trash"
        data["icons"][icon] = {"body": body(f"{name} {'home' if name == 'lucide' else 'trash'}")}
        path.write_text(json.dumps(data))
    source = IconSource(packages, sets=SETS)
    assert "trash" not in {item.object_id for item in source.objects()}
    assert "lucide/trash: a copy of lucide/home, which shows home" in source.skipped
    assert "object trash: drawn by 3 of the teams, fewer than 4" in source.skipped


def test_built_twice_it_is_the_same(packages: str, tmp_path: Path) -> None:
    found = []
    for out in ("a", "b"):
        build_shards(IconSource(packages, 32, sets=SETS), str(tmp_path / out), BuildOptions(min_shards=1, progress=False))
        files = [path for path in sorted((tmp_path / out).rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert set(IconSource.extras) <= set(found[0])
    text = found[0]["README.md"].decode()
    known = ICON_SETS["lucide"]
    row = "| lucide | LUCIDE by [team of lucide](https://lucide.example) | [ISC](https://lucide.example/licence) "
    assert f"{row}| `@iconify-json/lucide` {known.package.version}, sha256 {known.package.sha256} |" in text
    assert "[team of uil](https://uil.example) | Apache-2.0 | `" in text, "no link where the package has none"
    assert "| carbon | Apache-2.0 | `@carbon/icons` " in text
    assert Image.open(io.BytesIO(IconSource(packages, 32, sets=SETS).load(("ri", "home-line")))).size == (32, 32)


def test_nothing_depends_on_the_order_of_sets(packages: str) -> None:
    """Python orders the members of a set anew in each process."""
    for name in ("bi", "uil"):
        (path,) = Path(packages).glob(f"iconify-json-{name}-*/package/icons.json")
        data = json.loads(path.read_text())
        names = [f"{'brand-' if name == 'bi' else ''}{letter}{letter}" for letter in "bcdefgh"]
        path.write_text(json.dumps({**data, "icons": data["icons"] | {icon: {"body": body(icon)} for icon in names}}))
    code = (
        "import sys\nfrom mmref.shards.sources.icons import IconSource\n"
        f"source = IconSource(sys.argv[1], sets={SETS})\nprint(list(source.objects()), *source.skipped, sep='\\n')"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code, packages], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert told[0] == told[1] and "object hh: a brand as bi/brand-hh" in told[0]


def test_another_licence_is_an_error(packages: str) -> None:
    (path,) = Path(packages).glob("iconify-json-bi-*/package/info.json")
    path.write_text(path.read_text().replace('"spdx": "MIT"', '"spdx": "CC-BY-NC-4.0"'))
    with pytest.raises(SourceError, match=r"bi-.*info.json says that its licence is CC-BY-NC-4.0, expected MIT"):
        list(IconSource(packages, sets=SETS).objects())


def test_another_archive_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "npm"  # npm pack --silent --pack-destination FOLDER NAME
    program.write_text('#!/bin/sh\necho other > "$4/x-1.0.0.tgz"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SourceError, match=r"x@1.0.0 has come with the sha256 [0-9a-f]{64}, expected 0000"):
        npm.fetch("x", "1.0.0", str(tmp_path / "cache"), "0" * 64)


def test_the_sets_are_open() -> None:
    assert {known.licence for known in (*ICON_SETS.values(), *TAGS.values())} == {
        "MIT", "ISC", "Apache-2.0", "CC-BY-4.0", "CC-BY-3.0", "OFL-1.1", "CC0-1.0", "Unlicense",
    }  # fmt: skip
    texts = {path.stem for path in Path(LICENSES).iterdir()}
    assert texts == {known.licence for known in ICON_SETS.values()}, "a text for each"
    assert set(STYLES_OF) <= set(ICON_SETS) and set(READERS) == set(TAGS)
    assert {name for tags in TAGS.values() for name in tags.sets} <= set(ICON_SETS)


@pytest.mark.parametrize("icon_set, name, words", [
    ("bi", "alarm-fill", "alarm"), ("fluent", "alarm-24-filled", "alarm"), ("carbon", "arrow--up", "arrow up"),
    ("bi", "traffic-light", "traffic light"), ("stash", "bell-light", "bell"), ("hugeicons", "home-02", "home"),
    ("bi", "outline", "outline"), ("ic", "baseline-3d-rotation", "baseline 3d rotation"), ("healthicons", "baby-24px", "baby"),
])  # fmt: skip
def test_words_of_style_and_size(icon_set: str, name: str, words: str) -> None:
    assert " ".join(bare_words(name, styles_of(icon_set, {}))) == words


def test_styles_that_a_set_says_itself() -> None:
    styles = styles_of("x", {"prefixes": {"baseline": "Baseline", "": "None"}, "suffixes": {"outline-sharp": "Sharp"}})
    assert bare_words("baseline-home", styles) == ["home"] and bare_words("home-outline-sharp", styles) == ["home"]
    assert bare_words("home-sharp", styles) == ["home", "sharp"]


def test_the_order_of_words_says_something_about_directions_alone() -> None:
    assert object_of(["user", "add"]) == object_of(["add", "user"]) == "add-user"
    assert object_of(["arrow", "left"]) == object_of(["left", "arrow"])
    assert object_of(["left", "to", "right"]) != object_of(["right", "to", "left"])


@pytest.mark.parametrize("name, reason", [
    ("circle-x", ""), ("flag", ""), ("flag-up", ""), ("flag-de", "the flag of a country"), ("circle-b", "a letter"),
    ("looks-one", "a number"), ("4k", "a number"), ("battery-3", "a number"), ("logo-figma", "a brand"), ("github", "a brand"),
    ("sigma", "a letter"), ("tone", ""),
])  # fmt: skip
def test_names_of_no_thing(name: str, reason: str) -> None:
    assert unfit(name.split("-")) == reason


PHOSPHOR = """const n = [
  { name: "acorn", pascal_name: "Acorn", tags: ["*new*", "nut", "wild food"], codepoint: 60314 },
  { name: "bug", pascal_name: "Bug", tags: [], codepoint: 1 },
];"""


@pytest.mark.parametrize("package, file, content", [
    ("@carbon/icons", "metadata.json", {"icons": [{"name": "Acorn", "aliases": ["nut", "wild food"]}, {"name": "bug"}]}),
    ("@vscode/codicons", "dist/metadata.json", {"acorn": {"tags": ["nut", "wild food"]}, "bug": {}}),
    ("@fortawesome/fontawesome-free", "metadata/icon-families.json", {
        "acorn": {"search": {"terms": ["nut", "wild food", 7]}}, "bug": {"search": {"terms": []}}}),
    ("@gravity-ui/icons", "metadata.json", {"icons": [{"name": "acorn", "keywords": ["nut", "wild food"]}]}),
    ("ionicons", "dist/ionicons.json", {"icons": [
        {"name": "acorn", "tags": ["nut"]}, {"name": "acorn-sharp", "tags": ["acorn", "sharp", "wild food"]}]}),
    ("lucide-static", "tags.json", {"acorn": ["nut", "wild-food"], "bug": []}),
    ("@mdi/svg", "meta.json", [{"name": "acorn", "aliases": ["nut-outline"], "tags": ["Wild food / Nut"]}]),
    ("@primer/octicons", "build/data.json", {"acorn": {"keywords": ["nut", "wild food"]}}),
    ("@phosphor-icons/core", "dist/index.mjs", PHOSPHOR),
    ("@tabler/icons", "icons.json", {"acorn": {"tags": ["nut", "wild food", 5]}}),
])  # fmt: skip
def test_tags_of_each_package(package: str, file: str, content: object, tmp_path: Path) -> None:
    folder = write(tmp_path, package, "1.0.0", {file: content})
    styles = styles_of(TAGS[package].sets[0], {})
    assert read_tags(package, str(folder), styles) == {"acorn": ["nut", "wild food"]}
    write(tmp_path, package, "1.0.0", {file: "[7]"})
    if package == "@phosphor-icons/core":  # not JSON: what is not found is not there
        assert read_tags(package, str(folder), styles) == {}
    else:
        with pytest.raises(SourceError, match=f"{package} in .* has tags in another layout than expected"):
            read_tags(package, str(folder), styles)


def picture(side: int = 64, box: tuple[int, int, int, int] = (8, 8, 56, 56), color: str = "black") -> Image.Image:
    """A key: a disc and a bar."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    draw.ellipse((left, top, (left + right) // 2, (top + bottom) // 2), fill=color)
    draw.rectangle(((left + right) // 2, top + (bottom - top) // 5, right, bottom), fill=color)
    return image


def test_copies_have_other_margins_and_colors() -> None:
    key, small = picture(), picture(box=(14, 14, 50, 50))
    turned, tiny, aside = key.rotate(180), picture(box=(26, 26, 38, 38)), picture(box=(0, 0, 36, 36))
    prints = prints_of([key, small, picture(color="#113"), turned, tiny, aside])
    matrix = alike(prints, prints)
    assert matrix[0, 1] > 0.97 and matrix[0, 2] > 0.97 and matrix[0, 3] < 0.5, "margins and colors do not matter, the shape does"
    assert matrix[0, 4] == 0 and matrix[0, 5] == 0, "a dot is no disc, and a line below none above"
    assert copies(prints, 0.97) == [(1, 0), (2, 0)]


def test_correlation_is_that_of_numpy() -> None:
    chance = np.random.default_rng(0)
    images = [Image.fromarray(chance.integers(0, 256, (64, 64, 3)).astype(np.uint8)) for _ in range(4)]
    prints = prints_of(images)
    assert np.allclose(alike(prints, prints), np.corrcoef(prints.cells), atol=1e-9)


def test_shared_looks_across_blocks() -> None:
    chance = np.random.default_rng(0)
    noise = [Image.fromarray(chance.integers(0, 2, (8, 8)).astype(np.uint8) * 255).resize((64, 64), 0) for _ in range(BLOCK)]
    prints = join([prints_of([picture()]), prints_of([image.convert("RGB") for image in noise]), prints_of([picture()])])
    owners = list(range(BLOCK + 2))
    assert shared(prints, owners, 0.99) == [(0, BLOCK + 1)]
    owners[-1] = 0
    assert shared(prints, owners, 0.99) == [], "of one object"
    assert copies(prints_of([]), 0.9) == [] and shared(join([]), [], 0.9) == []

"""The emoji source on packages made here; the committed set: sound, its counts right, its tokenizer loads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SampleError, SourceError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.samples import hash_split
from mmref.shards.sources import npm
from mmref.shards.sources.emoji import ARTIST_SETS, TEXT, EmojiSource
from mmref.shards.sources.emoji_names import normal_code, squash
from mmref.shards.tokenizer import train_tokenizer

BUNDLED = Path(__file__).parents[2] / "data_shards" / "emoji"
RED = '<path d="M0 0h8v16H0z" fill="red"/>'


def emoji_entry(code, label, tags, skins=()):
    text = "".join(chr(int(part, 16)) for part in code.split("-"))
    return {"hexcode": code, "emoji": text, "label": label, "tags": tags, "group": 0, "skins": list(skins)}


@pytest.fixture
def packages(tmp_path):
    """Folder of tiny packages: a waving hand and its light variant, a flipped arrow, a shared and a blank drawing."""

    def put(package, version, files):
        root = tmp_path / "packages" / npm.folder_name(package, version) / "package"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(json.dumps(content))

    def body(colour):
        return RED.replace("red", colour)

    for number, (name, pinned) in enumerate(ARTIST_SETS.items(), 1):
        listing = name in ("twemoji", "noto")
        icons = {
            "waving-hand": {"body": body(f"#{number}00")},
            "hand-wave-light-skin-tone" if listing else "waving-hand-light-skin-tone": {"body": body(f"#0{number}0")},
            "left-arrow": {"body": body(f"#00{number}"), "width": 16, "height": 8, "top": 0},
            "man": {"body": f'<g id="{name}1"><path d="M0 0h9v9" fill="#12{number}"/></g>'},
            "man-light-skin-tone": {"body": f'<g id="{name}2"><path d="M0 0h9v9" fill="#12{number}"/></g>'},
            "ghost": {"body": body("white" if name == "fxemoji" else f"#ff{number}")},
        }
        chars = {"1f44b": "waving-hand", "1f44b-1f3fb": "hand-wave-light-skin-tone", "2b05": "left-arrow"}
        chars |= {"27a1-fe0f": "right-arrow", "1f468": "man", "1f468-1f3fb": "man-light-skin-tone", "1f47b": "ghost"}
        data = {
            "prefix": name, "width": 16, "height": 16, "icons": icons,
            "aliases": {"right-arrow": {"parent": "left-arrow", "hFlip": True}, "wave": {"parent": "waving-hand"}},
        }  # fmt: skip
        info = {"name": name, "author": {"name": "x", "url": "y"}, "license": {"title": "MIT", "url": "z"}}
        put(*pinned, {"icons.json": data, "chars.json": chars if listing else {}, "info.json": info})
    light = emoji_entry("1F44B-1F3FB", "waving hand: light skin tone", [])
    man_light = emoji_entry("1F468-1F3FB", "man: light skin tone", [])
    entries = [
        emoji_entry("1F44B", "waving hand", ["hello", "wave"], [light]),
        emoji_entry("2B05-FE0F", "left arrow", []),
        emoji_entry("27A1-FE0F", "right arrow", []),
        emoji_entry("1F468", "man", ["adult"], [man_light]),
        emoji_entry("1F47B", "ghost", []),
    ]
    short = {f"en/shortcodes/{vendor}.json": {"1F44B": ["wave", "bye_bye"]} for vendor in ("cldr", "joypixels")}
    short |= {f"en/shortcodes/{vendor}.json": {} for vendor in ("github", "iamcal")}
    messages = {"groups": [{"order": 0, "message": "smileys"}]}
    put(*TEXT["emojibase"], {"en/data.json": entries, "en/messages.json": messages, **short})
    notes = {"👋": {"default": ["hand", "wave"], "tts": ["waving hand"]}}
    put(*TEXT["cldr"], {"annotations/en/annotations.json": {"annotations": {"annotations": notes}}})
    return str(tmp_path / "packages")


def test_objects_and_captions(packages):
    found = {item.object_id: item for item in EmojiSource(packages).objects()}
    assert set(found) == {"1f44b", "1f44b-1f3fb", "2b05", "27a1", "1f468", "1f47b"}
    assert all(item.split == hash_split(name, {"train": 0.7, "val": 0.1, "test": 0.2}) for name, item in found.items())
    assert {name: len(item.images) for name, item in found.items()} == dict.fromkeys(found, 7)
    image = found["1f44b"].images[0]
    assert dict(zip(image.caption_kinds, image.captions, strict=True)) == {
        "standard": "waving hand", "keywords": "hand, wave", "tags": "bye bye, hello",
    }  # fmt: skip
    assert image.extra == {"set": "twemoji", "emoji": "👋", "group": "smileys"}
    image = found["1f44b-1f3fb"].images[0]
    assert dict(zip(image.caption_kinds, image.captions, strict=True)) == {
        "name": "hand wave light skin tone", "standard": "waving hand: light skin tone",
        "keywords": "hand, wave, light skin tone", "tags": "bye bye, hello, light skin tone",
    }  # fmt: skip
    assert found["1f44b-1f3fb"].images[2].captions[1] == "waving hand light skin tone", "each drawing has its own name"
    assert [i.ref[1] for i in found["27a1"].images] == ["right-arrow"] * 7


def test_a_picture_used_twice_stays_with_the_base(packages):
    """`man` and its light variant are one picture up to the ids inside it."""
    found = {item.object_id for item in EmojiSource(packages).objects()}
    assert "1f468" in found and "1f468-1f3fb" not in found


def test_rendering(packages):
    pytest.importorskip("resvg_py")
    source = EmojiSource(packages, size_px=32)

    def pixels(icon):
        return np.asarray(Image.open(io.BytesIO(source.load(("twemoji", icon)))).convert("RGB")).astype(int)

    hand = pixels("waving-hand")
    assert hand.shape == (32, 32, 3)
    assert hand[:, 3:13].max() < 60 and hand[:, 19:].min() > 230, "left half drawn, the rest white, not black"
    left, right = pixels("left-arrow"), pixels("right-arrow")
    assert np.abs(left - right[:, ::-1]).max() < 40 and np.abs(left - right).max() > 150, "mirrored"
    assert left[:6].min() > 230 and left[-6:].min() > 230, "a wide drawing keeps its proportions, centred"
    with pytest.raises(SampleError, match="fxemoji/ghost is blank"):
        source.load(("fxemoji", "ghost"))


def test_built_twice_it_is_the_same(packages, tmp_path):
    pytest.importorskip("resvg_py")
    options = BuildOptions(min_shards=2, progress=False, pack=True, tokenizer_vocab=60)
    found = []
    for out in ("a", "b"):
        manifest = build_shards(EmojiSource(packages), str(tmp_path / out), options)
        files = [p for p in sorted((tmp_path / out).rglob("*")) if p.is_file()]
        found.append({str(p.relative_to(tmp_path / out)): p.read_bytes() for p in files})
    assert found[0] == found[1]
    assert {"README.md", "LICENSES/Apache-2.0.txt", "tokenizer/tokenizer.json"} <= set(found[0])
    assert manifest["skipped"]["first"] == ["1f47b_fxemoji: fxemoji/ghost is blank"]


def test_names():
    assert squash("Flag: Côte d’Ivoire") == squash("flag-for-cote-d-ivoire") == squash("flag-for-flag-cote-divoire")
    assert normal_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SourceError, match=r"@iconify-json/twemoji@.*`npm` is not installed.*--packages"):
        EmojiSource()


def test_npm_failure_is_a_source_error(tmp_path, monkeypatch):
    npm_program = tmp_path / "npm"
    npm_program.write_text("#!/bin/sh\necho 'E404 no such version' >&2\nexit 1\n")
    npm_program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SourceError, match=r"npm pack.*x@9.9.9.*E404 no such version"):
        npm.fetch("x", "9.9.9", str(tmp_path / "cache"))


def test_broken_package(packages):
    name, version = ARTIST_SETS["noto"]
    (Path(packages) / npm.folder_name(name, version) / "package" / "icons.json").write_text("{")
    with pytest.raises(SourceError, match=r"icons.json cannot be read"):
        list(EmojiSource(packages).objects())


@pytest.fixture(scope="module")
def bundled():
    return ShardSet.open(str(BUNDLED))


def test_bundled_set_is_sound(bundled):
    assert bundled.verify() == []
    assert bundled.splits == ["train", "val", "test"]
    splits = bundled.manifest["splits"].values()
    assert sum(entry["objects"] for entry in splits) > 3000 and sum(entry["images"] for entry in splits) > 16000
    tracked = [p for p in BUNDLED.rglob("*") if p.is_file() and p.suffix != ".tar"]
    assert sum(p.stat().st_size for p in tracked) < 14e6, "what is committed stays small"


def test_bundled_samples(bundled):
    for split in bundled.splits:
        index = bundled.index(split)
        assert np.diff(index.object_start).min() >= 3
        assert all(hash_split(o, {"train": 0.7, "val": 0.1, "test": 0.2}) == split for o in index.object_ids)
        reader = SampleReader(index)
        for i in range(0, len(index), 97):
            raw = reader.read(i)
            assert raw.image_ext == "webp" and Image.open(io.BytesIO(raw.image_bytes)).size == (64, 64)
            assert raw.meta["set"] in ARTIST_SETS and raw.meta["emoji"] and raw.meta["group"]
            assert len(raw.meta["captions"]) == len(raw.meta["caption_kinds"]) == index.n_captions[i]
            assert raw.meta["caption_kinds"][0] == "standard"
            assert len(set(raw.meta["captions"])) == len(raw.meta["captions"])


def test_bundled_tokenizer_works_offline(bundled, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED / "tokenizer"))
    names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4, 2, 3]
    assert len(tokenizer) == 4000
    text = "waving hand: medium-light skin tone"
    ids = tokenizer("Waving Hand: medium-light skin tone")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    reader = SampleReader(bundled.index("test"))
    captions = [c for i in range(0, len(reader.index), 50) for c in reader.read_meta(i)["captions"]]
    tokens = [token for caption in captions for token in tokenizer(caption)["input_ids"]]
    assert tokens.count(1) / len(tokens) < 0.005, "unseen captions are still spelled in known pieces"


def test_tokenizer_does_not_depend_on_chance(tmp_path):
    """Ties between pairs are many in so small a text; each run of the library's own trainer would break them anew."""
    captions = ["ab cd ef", "cd ab gh", "ef gh abcd"] * 3
    vocabularies = []
    for run in ("a", "b"):
        train_tokenizer(iter(captions), str(tmp_path / run), 30)
        vocabularies.append(json.loads((tmp_path / run / "tokenizer.json").read_text())["model"]["vocab"])
    assert vocabularies[0] == vocabularies[1]
    assert list(vocabularies[0])[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabularies[0]["ab"] == 5 + len("aceg") + len("bcdfh"), "after all first and later letters, the commonest pair"

"""`mmref shards ...`: the commands print what they did, and their exit codes can be used in scripts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmref.errors import SourceError, StorageError, UsageError
from mmref.shards.command import build_parser, main
from mmref.shards.source_options import parse_fractions


@pytest.fixture
def shards(capsys):
    def call(*words: object) -> tuple[int, str]:
        """Exit code and output of `mmref shards <words>`."""
        return main([str(word) for word in words]), capsys.readouterr().out

    return call


def test_build_inspect_verify(shards, make_table, tmp_path):
    out, sheet = tmp_path / "set", tmp_path / "sheet.png"
    build = ["build", "table", make_table(), "--captions", "name", "detail", "--out", out, "--workers", 0]
    code, text = shards(*build, "--min-shards", 2, "--keep", "colour", "--fractions", "train=0.5,test=0.5")
    assert code == 0 and "train" in text and "test" in text and "\nval" not in text and "(no val: " in text and str(out) in text
    code, text = shards("inspect", out, "--sheet", sheet)
    assert code == 0 and "20" not in text.split("objects")[0]
    assert "kinds: name 50 %, detail 50 %" in text and "thing " in text
    assert Image.open(sheet).size[0] > 200
    with pytest.raises(StorageError, match=r"--sheet .* cannot be written: it is a folder"):
        shards("inspect", out, "--sheet", tmp_path)
    assert shards("verify", out) == (0, f"{out}: sound\n")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(
        json.dumps({key: manifest[key] for key in ("version", "splits")})
    )  # as others may write it
    code, text = shards("inspect", out)
    assert code == 0 and text.startswith("set: of an unknown source\nlicence: not stated\n")
    tar = next(out.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"thing", b"thong", 1))
    code, text = shards("verify", out)
    assert code == 1 and "wrong_checksum" in text and text.endswith("1 problems\n")
    assert shards("verify", out, "--fast")[0] == 0


def test_the_sheet_shows_pictures_as_they_are_decoded(shards, tmp_path):
    Image.fromarray(np.full((40, 40), 150 * 257, np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,object_id,caption\na.png,x,text\n")
    shards("build", "table", tmp_path / "t.csv", "--out", tmp_path / "set", "--workers", 0, "--fractions", "train=1")
    shards("inspect", tmp_path / "set", "--sheet", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").getpixel((20, 34)) == (150, 150, 150)


def test_left_out_samples_are_printed(shards, tmp_path, encode):
    (tmp_path / "a.png").write_bytes(encode(0))
    (tmp_path / "t.csv").write_text("image,object_id,caption\na.png,x,text\nb.png,x,text\n")
    _, text = shards("build", "table", tmp_path / "t.csv", "--out", tmp_path / "set", "--workers", 0)
    assert "1 left out" in text and "b.png: " in text


@pytest.mark.parametrize("source", [["table", "t.csv"], ["folder", "f"], ["dataset", "a/b"]])
def test_a_column_of_captions_that_is_named_twice_counts_once(source):
    args = build_parser().parse_args(["build", *source, "--out", "x", "--captions", "caption", "title", "caption"])
    assert args.captions == ["caption", "title"]


def test_defaults_of_one_source_do_not_leak_into_another():
    parser = build_parser()
    emoji = parser.parse_args(["build", "emoji", "--out", "x"])
    table = parser.parse_args(["build", "table", "t.csv", "--out", "x"])
    assert (emoji.tokenizer_vocab, table.tokenizer_vocab) == (4000, None)
    assert table.fractions == {"train": 0.7, "val": 0.1, "test": 0.2}


@pytest.mark.parametrize(
    "text",
    ["train", "train=a", "train=0.5,test=0.4", "train=1.5,test=-0.5", "train=nan", "train=0.5,train=0.5", "val=0.5,dev=0.5"],
)
def test_fractions(text):
    with pytest.raises(UsageError, match="--fractions"):
        parse_fractions(text)


def test_fractions_name_splits():
    assert parse_fractions("Train=0.7,validation=0.1, test=0.2") == {"train": 0.7, "val": 0.1, "test": 0.2}
    for name in ("../esc", "a/b", "", "."):
        with pytest.raises(SourceError, match="cannot name a split"):
            parse_fractions(f"{name}=0.5,train=0.5")

"""What users write is read in the encoding its mark names, or refused with the line; YAML has distinct keys."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmref.cli import main
from mmref.config import load_config, read_yaml
from mmref.errors import ConfigError, QueryError, SourceError
from mmref.storage.texts import open_text, parse_yaml, read_lines, read_text

TEXT = "eins: Größe\nzwei: 2 €\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE,
}  # fmt: skip


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("marks", [1, 2])
def test_a_mark_says_the_encoding(tmp_path: Path, encoding: str, marks: int) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(MARKED[encoding] * marks + TEXT.encode(encoding))
    assert read_text(str(path), ConfigError) == TEXT
    assert read_yaml(str(path)) == {"eins": "Größe", "zwei": "2 €"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_alone(tmp_path: Path, end: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(end.join(["a\u2028b.png", "", " c\x85d\x0be.png\t", "z"]).encode())
    assert read_lines(str(path), QueryError) == ["a\u2028b.png", "", "c\x85d\x0be.png", "z"]
    assert read_text(str(path), QueryError).count("\n") == 3
    with open_text(str(path), QueryError) as file:
        assert file.read().count(end) == 3, "as they are in the file"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a\nb\ncafé\n".encode("latin-1"), ["is not UTF-8", "line 3", "0xe9", "'é' in Windows-1252", "Save the file"]),
        ("a\rb\rcafé\r".encode("latin-1"), ["line 3"]),
        ("猫\r\n犬\r\n".encode("shift-jis"), ["is not UTF-8", "line 1", "0x94"]),
        (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"\0", ["is not UTF-16-LE", "line 1"]),
        ("train: {}".encode("utf-16-le"), ["UTF-16 without a byte order mark"]),
        ("train: {}".encode("utf-16-be"), ["UTF-16 without a byte order mark"]),
        (b"PK\3\4 and more", ["spreadsheet or ZIP archive"]),
        (b"\x1f\x8b\x08", ["packed with gzip"]),
        (b"\xed\xa0\x80", ["is not UTF-8", "line 1"]),
    ],
)
def test_what_is_no_such_text_is_named_with_its_line(tmp_path: Path, data: bytes, said: list[str]) -> None:
    path = tmp_path / "text"
    path.write_bytes(data)
    for wrong in (ConfigError, SourceError):
        with pytest.raises(wrong) as error:
            read_text(str(path), wrong)
        assert type(error.value) is wrong and str(path) in str(error.value)
        assert all(word in str(error.value) for word in said), error.value


def test_missing_files_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"none.txt cannot be read: No such file"):
        read_lines(str(tmp_path / "none.txt"), QueryError)
    with pytest.raises(QueryError, match="cannot be read: Is a directory"):
        read_lines(str(tmp_path), QueryError)
    os.mkfifo(pipe := tmp_path / "pipe")
    threading.Thread(target=lambda: pipe.write_text("a\nb\n"), daemon=True).start()
    assert read_lines(str(pipe), QueryError) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "`a` is given twice, in line 1 and in line 3"),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "`b` is given twice, in line 2 and in line 4"),
        ("a: [1, {b: 1, b: 2}]", "`b` is given twice, in line 1 and in line 1"),
        ("rows:\n  'x': {}\n  x: {}\n", "`x` is given twice, in line 2 and in line 3"),
        ("1: a\n0x1: b\n", "`0x1` is given twice"),
        ("a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: *a\n  <<: *b\n", "`<<` is given twice, in line 4 and in line 5"),
        ("a:\n\tb: 1\n", "line 2, column 1 is not YAML.*tabs"),
        ("a: 1\n---\nb: 2\n", "not YAML: expected a single document"),
        ("a: 2024-02-31\n", "not YAML: day is out of range"),
        ("a: \0\n", "not YAML"),
        ("- a\n", "must hold keys and values, found a list"),
        ("[]\n", "must hold keys and values, found a list"),
        ("false\n", "must hold keys and values, found a bool"),
        ("a: 1\nb: {seed: 010}\n", "`010` in line 2 is the number 8"),
        ("a: [1, -0_17]\n", "`-0_17` in line 1 is the number -15"),
        ("a: 1:30\n", "`1:30` in line 1 is the number 90"),
        ("a: 1:30.5\n", "`1:30.5` in line 1 is the number 90.5"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"f.yaml.*{said}"):
        parse_yaml(text, "f.yaml", ConfigError)


def test_yaml_that_is_as_before() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {b: 3}\nx:\n  <<: *base\n  b: 4\ny: {<<: [*more, *base], c: on}\n"
    assert parse_yaml(text, "f", ConfigError) == {
        "base": {"a": 1, "b": 2}, "more": {"b": 3}, "x": {"a": 1, "b": 4}, "y": {"a": 1, "b": 3, "c": True},
    }  # fmt: skip
    assert parse_yaml("# nothing\n", "f", ConfigError) == {}
    numbers = "a: [0, -0, 0x10, 0b11, 1_000, +5, 0.5, 00.5, .5, 1.0e-3, '010', '1:30', 08, 0o10]"
    assert parse_yaml(numbers, "f", ConfigError)["a"] == [
        0, 0, 16, 3, 1000, 5, 0.5, 0.5, 0.5, 1e-3, "010", "1:30", "08", "0o10"
    ]  # fmt: skip


@pytest.mark.parametrize("flag", [["--config", "{}"], ["--config={}"]])
def test_configs_are_read_alike(tmp_path: Path, flag: list[str]) -> None:
    """As the checks see a file, so does the parser of values; flags after it win."""
    path = tmp_path / "größe.yaml"
    text = "---\n# Größe\nrun_dir: 🚀 läufe\ntrain:\n  lr: 2e-3\n  max_steps: 5\n"
    text += "model: {vision: '1e-3', text: tiny, vision_config: {eps: 1e-6}}\n"
    path.write_bytes(text.encode("utf-16"))
    config = load_config([*(word.format(path) for word in flag), "--train.max_steps", "7"])
    assert (config.run_dir, config.train.lr, config.train.max_steps) == ("🚀 läufe", 0.002, 7)
    assert (config.model.vision, config.model.vision_config) == ("1e-3", {"eps": 1e-6})
    path.write_text(text + "train: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match="`train` is given twice, in line 4 and in line 8"):
        load_config([word.format(path) for word in flag])
    path.write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match=r"größe.yaml is empty"):
        load_config([word.format(path) for word in flag])


def test_the_terminal_does_not_say_how_a_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run_dir: läufe\nmodel: {dual: tiny}\n", encoding="utf-8")
    code = f"from mmref.config import load_config; print(ascii(load_config(['--config', {str(path)!r}]).run_dir))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii("läufe")


@pytest.mark.parametrize("argv", [
    ["train", "--config", "{}"],
    ["ablate", "--config", "configs/smoke.yaml", "--rows", "{}"], ["search", "nowhere", "--batch", "{}"],
    ["index", "remove", "nowhere", "--ids-file", "{}"], ["references", "remove", "nowhere", "--file", "{}"],
    ["shards", "build", "table", "{}.csv", "--out", "{}.set"], ["serve", "nowhere", "--token-file", "{}"],
    ["ablate", "--config", "configs/smoke.yaml", "--results", "{}"],
])  # fmt: skip
def test_every_command_names_the_line(tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text"
    for name in (path, tmp_path / "text.csv"):
        name.write_bytes(b"image: 1\nGr\xf6\xdfe: 2\n")
    assert main([word.format(path) for word in argv]) == (2 if argv[0] in ("train", "ablate") else 1)  # of a config
    error = capsys.readouterr().err
    assert "text" in error and "is not UTF-8: in line 2 the byte 0xf6" in error and "Traceback" not in error

"""What data says is shown on a terminal, and never obeyed by it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from mmref.cli import main
from mmref.errors import MMRefError
from mmref.retrieval.searcher import Result
from mmref.retrieval.show import format_results
from mmref.terminal.output import PrintableFormatter, printable
from mmref.terminal.run_command import run_command

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\r\n\x9b1A\u202egnp.exe\u2066\x7f"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\r\n\x9b1A\u202egnp.exe\u2066\x7f"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("line\nnext\x1b", lines=True) == "line\nnext\\x1b"
    plain = "Grüße, 漢字, עברית, می\u200cخواهم, 👩\u200d🚀"  # joiners are part of words and drawings
    assert printable(plain) == plain
    assert printable("no-utf8-\udcff").encode() == rb"no-utf8-\udcff"
    assert all(len(printable(chr(c))) > 1 for c in range(0x110000) if chr(c) < " " or 0x7F <= c < 0xA0)


def test_results_stay_in_their_rows() -> None:
    lines = format_results([Result(1, HOSTILE, 0.5, 0.5, 1, HOSTILE, "p", 1, 1)]).splitlines()
    assert len(lines) == 2 and lines[1].endswith(f"{SHOWN[:20]} ...{SHOWN[-45:]}")


def test_errors_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        logging.getLogger("mmref.some").warning("skipped %s", HOSTILE)
        raise MMRefError(f"no item {HOSTILE}.")

    root, handlers = logging.getLogger(), logging.getLogger().handlers
    root.handlers = []  # as in a process that sets up none
    try:
        assert run_command(fail) == 1
    finally:
        root.handlers = handlers
    said = capsys.readouterr().err
    assert f"no item {SHOWN}.".replace(r"\n", "\n") in said and f"skipped {SHOWN}".replace(r"\n", "\n") in said
    assert not re.search(r"[\x1b\x9b\r\u202e]", said)
    record = logging.LogRecord("x", logging.ERROR, "", 1, "%s", (HOSTILE,), None)
    assert "\x1b" not in PrintableFormatter("mmref: %(message)s").format(record)


def test_a_shard_set_is_inspected_without_harm(tmp_path: Path, make_png: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": make_png.name, "object_id": "o\x1b[31m", "caption": HOSTILE, "split": "test"}
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps(r) for r in (row, row | {"image": "missing\x1b[8m.png"})))
    assert main(["shards", "build", "table", str(table), "--out", str(tmp_path / "set"), "--workers", "0"]) == 0
    assert main(["shards", "inspect", str(tmp_path / "set")]) == 0
    assert main(["shards", "verify", str(tmp_path / "set")]) == 0
    said = capsys.readouterr().out
    assert r"o\x1b[31m" in said and r"missing\x1b[8m.png" in said and r"\x1b]0;owned\x07" in said
    assert not re.search(r"[\x1b\x9b\r\u202e\x07]", said)


@pytest.fixture
def make_png(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"

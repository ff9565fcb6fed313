"""How far a command has come: lines now and then in a log, a bar on a terminal."""

from __future__ import annotations

import io
import sys

from mmref.terminal import progress
from mmref.terminal.progress import Counter, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_ten_seconds_and_none_of_a_short_count(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Counter("embedding", 2000, "image", done=500) as counter:
        for _ in range(10):
            now += 2.5
            counter.add(100)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "embedding: 900 of 2,000 images, 40.0 images/s, eta 0:27",
        "embedding: 1,300 of 2,000 images, 40.0 images/s, eta 0:17",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Counter("embedding", 20, "image", done=5) as counter:
        counter.add(15)
    assert "embedding" in terminal.getvalue() and "20/20" in terminal.getvalue()


def test_a_count_goes_on_where_standard_error_is_full(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    monkeypatch.setattr(sys, "stderr", Full())
    progress.say("scoring test ...")


def test_a_duration_has_hours_only_where_it_takes_them():
    assert [clock(s) for s in (5, 125, 3725)] == ["0:05", "2:05", "1:02:05"]

"""Flags that are spelled in either way, the level of the log, and the status of wrong usage."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mmref import cli
from mmref.config import load_config
from mmref.errors import ConfigError
from mmref.terminal.parser import Parser, log_at, respelled


@pytest.fixture
def own_log() -> Iterator[None]:
    """The log as it was, afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("mmref")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_flags_are_known_by_either_spelling() -> None:
    parser = Parser(prog="p")
    parser.add_argument("--max-items", type=int)
    parser.add_argument("--run_dir")
    parser.add_argument("words", nargs="*")
    for argv in (
        ["--max_items", "3", "--run-dir", "a_b"],
        ["--max-items=3", "--run-dir=a_b"],
        ["--max_items=3", "--run_dir=a_b"],
    ):
        args = parser.parse_args(argv)
        assert (args.max_items, args.run_dir) == (3, "a_b")
    assert parser.parse_args(["x", "--", "--max_items"]).words == ["x", "--max_items"]
    assert parser.parse_known_args(["--other_flag"])[1] == ["--other_flag"], "not ours to respell"


def test_subcommands_take_both_too() -> None:
    parser = Parser(prog="p")
    parser.add_subparsers().add_parser("sub").add_argument("--no-refine", action="store_true")
    assert parser.parse_args(["sub", "--no_refine"]).no_refine


def test_a_config_s_flags_are_known_by_either_spelling() -> None:
    for flag in ("--train.max-steps", "--train.max_steps", "--train.max-steps=7"):
        assert load_config(["--config", "smoke", flag, *([] if "=" in flag else ["7"])]).train.max_steps == 7
    assert load_config(["--config", "smoke", "--run-dir", "a-b"]).run_dir == "a-b"
    with pytest.raises(ConfigError, match=r"`train\.max-step`.*`train\.max_steps`"):
        load_config(["--train.max-step", "7"])


def test_values_and_what_is_behind_two_hyphens_are_left_alone() -> None:
    words = ["--a_b=c_d", "e_f", "--", "--a_b"]
    assert respelled(words, ["--a-b"]) == ["--a-b=c_d", "e_f", "--", "--a_b"]


def test_the_log_is_written_from_a_level_on(own_log: None, capsys: pytest.CaptureFixture[str]) -> None:
    log_at("info")
    logging.getLogger("mmref.x").info("ours \x1b")
    logging.getLogger("other").info("theirs")
    logging.getLogger("other").warning("theirs, a warning")
    assert capsys.readouterr().err == "INFO mmref.x: ours \\x1b\nWARNING other: theirs, a warning\n"
    log_at("error")
    logging.getLogger("mmref.x").warning("ours")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", [["--log-level", "debug", "ledger", "/no"], ["ledger", "--log_level=debug", "/no"]])
def test_every_command_takes_the_level_before_or_behind_its_name(argv: list[str], own_log: None) -> None:
    assert cli.main(argv) == 1
    assert logging.getLogger("mmref").level == logging.DEBUG


def test_train_takes_it_as_well(own_log: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--log-level", "error", "--train.no_such_field", "1"]) == 2
    assert logging.getLogger("mmref").level == logging.ERROR
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--log-level", "loud"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-flag"],
        ["no-such-command"],
        ["search"],
        ["search", "i", "--top", "0"],
        ["search", "i", "text", "--batch", "lines"],
        ["search", "i", "text", "--where", "color"],
        ["search", "", "text"],
        ["judge", "i", "text"],
        ["index", "remove", "i"],
        ["references", "remove", "run"],
        ["serve", "i", "--replicas", "0", "--min-replicas", "2"],
        ["sizing", "--objects", "3", "--train.no_such_field", "1"],
        ["sizing", "--objects", "3", "--config", "no-such-config"],
    ],
)
def test_wrong_usage_ends_with_status_2(argv: list[str]) -> None:
    try:
        assert cli.main(argv) == 2
    except SystemExit as left:
        assert left.code == 2

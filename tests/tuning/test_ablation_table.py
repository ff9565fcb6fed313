"""The tables of an ablation from made-up results, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io

import matplotlib as mpl
import pytest

from mmref.tuning.ablation_table import markdown, mean_interval, plot, ratio_interval, summarise, table_csv
from mmref.tuning.rows import Row, Rows, Training

T_3 = 4.302652729911275  # Student's t for three seeds, 97.5 %
ROWS = Rows((Row("plain"), Row("full"), Row("full, refined", of="full", refined=True, against="full")), "plain")


def metrics(initial: float, refined: float, step_seconds: float = 1.0) -> dict:
    state = {name: {"R@1": value, "mAP": value / 2} for name, value in (("initial", initial), ("refined", refined))}
    return {**state, "by_caption_kind": {"name": state}, "step_seconds": step_seconds, "machine": "one"}


def results(rows: Rows = ROWS) -> dict:
    found = {}
    for seed, (plain, full, refined) in enumerate([(40, 43, 44), (42, 44, 46), (41, 45, 45)]):
        for point in rows.points:
            found[Training("plain", point, seed)] = metrics(plain, plain, 0.5)
            found[Training("full", point, seed)] = metrics(full, refined, 0.6)
    return found


def test_means_paired_differences_and_contributions() -> None:
    plain, full, refined = summarise(ROWS, results(), [0, 1, 2], "name")
    assert plain["R@1"]["mean"] == 41 and "delta_R@1" not in plain and plain["step_ratio"] == 1.0
    half = T_3 * 1.0 / 3**0.5  # the seeds' standard deviation is 1
    assert plain["R@1"]["ci95"] == pytest.approx([41 - half, 41 + half])
    assert full["delta_R@1"]["mean"] == pytest.approx(3) and full["step_ratio"] == pytest.approx(1.2)
    assert full["delta_R@1"]["ci95"] == pytest.approx([3 - half, 3 + half])  # differences 3, 2, 4
    assert refined["delta_mAP"]["mean"] == pytest.approx(2) and refined["against"] == "full"
    assert refined["contribution_R@1"]["mean"] == pytest.approx(1)
    assert refined["name R@1"]["mean"] == pytest.approx(45)


def test_seeds_that_are_missing_pair_with_none() -> None:
    found = results()
    del found[Training("full", None, 1)]
    _, full, _ = summarise(ROWS, found, [0, 1, 2])
    assert full["seeds"] == [0, 2] and full["delta_R@1"]["mean"] == pytest.approx(3.5)
    only_plain = summarise(ROWS, {Training("plain", None, 0): metrics(1, 1)}, [0, 1])
    assert [row["name"] for row in only_plain] == ["plain"]
    assert only_plain[0]["R@1"]["ci95"] is None, "one seed has no interval"


def test_times_of_steps_compare_on_one_machine_alone() -> None:
    found = results()
    for seed in (0, 1):
        found[Training("full", None, seed)] |= {"machine": "another", "step_seconds": 60.0}
    assert summarise(ROWS, found, [0, 1, 2])[1]["step_ratio"] == pytest.approx(1.2)
    found[Training("full", None, 2)]["machine"] = None  # not on record
    table = summarise(ROWS, found, [0, 1, 2])
    assert table[1]["step_ratio"] is None and markdown(table, "plain").splitlines()[3].endswith("|  |")


def test_kinds_of_captions_that_some_trainings_have_not_on_record() -> None:
    found = results()
    found[Training("plain", None, 0)]["by_caption_kind"] = {}
    plain, full, _ = table = summarise(ROWS, found, [0, 1, 2], "name")
    assert "name R@1" not in plain and "delta_name R@1" not in full and full["name R@1"]["mean"] == pytest.approx(44)
    assert len({line.count("|") for line in markdown(table, "plain").splitlines()}) == 1


def test_the_protocol_of_classes_where_it_was_evaluated() -> None:
    found = results()
    for seed in range(3):
        for row, value in (("plain", 50.0), ("full", 51.0 + seed)):
            by_class = {state: {"AP@50": value, "image top-1": 2 * value} for state in ("initial", "refined")}
            found[Training(row, None, seed)]["class_protocol"] = by_class
    plain, full, _ = table = summarise(ROWS, found, [0, 1, 2])
    assert plain["AP@50"]["mean"] == 50 and full["delta_AP@50"]["mean"] == pytest.approx(2)
    assert full["delta_image top-1"]["mean"] == pytest.approx(4)
    assert "| AP@50 | image top-1 |" in markdown(table, "plain")
    del found[Training("full", None, 1)]["class_protocol"]
    assert "AP@50" not in summarise(ROWS, found, [0, 1, 2])[1]


def test_one_value_has_no_interval() -> None:
    import numpy as np

    assert mean_interval(np.array([3.0])) == {"mean": 3.0, "ci95": None}


@pytest.mark.parametrize("points", [(None,), (0.0, 0.5)])
def test_tables_and_plot(points: tuple) -> None:
    rows = Rows(ROWS.rows, "plain", "" if points == (None,) else "data.caption_noise", points)
    table = summarise(rows, results(rows), [0, 1, 2])
    assert len(table) == 3 * len(points)
    text = markdown(table, "plain")
    assert f"| full |{' 0.5 |' if len(points) > 1 else ''} 44.0 [" in text and "R@1 +3.0 [+0.5, +5.5]" in text
    assert "over full |" in text and text.count("\n") == 1 + len(table)
    lines = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert len(lines) == len(table) and float(lines[1]["delta_R@1 mean"]) == pytest.approx(3)
    assert lines[0]["delta_R@1 mean"] == "" and lines[0]["seeds"] == "0 1 2"
    assert plot(table, rows.baseline, rows.over).startswith(b"\x89PNG")
    with mpl.rc_context({"text.usetex": True}):  # as a matplotlibrc may have it, where there is no LaTeX
        assert plot(table, rows.baseline, rows.over).startswith(b"\x89PNG")
    for entry in table:
        entry["name"] += "|x"
    cells = {line.replace("\\|", "").count("|") for line in markdown(table, "plain|x").splitlines()}
    assert cells == {text.splitlines()[0].count("|")}


def test_what_is_lost_over_the_values_of_a_field() -> None:
    rows = Rows((Row("plain"), Row("full")), "plain", "data.caption_noise", (0.0, 0.5))
    found = {}
    for seed, (plain, full) in enumerate([(10, 4), (12, 5), (11, 6)]):  # points lost
        for name, lost in (("plain", plain), ("full", full)):
            found[Training(name, 0.0, seed)] = metrics(50 + seed, 0)
            found[Training(name, 0.5, seed)] = metrics(50 + seed - lost, 0)
    at_0, _, plain, full = summarise(rows, found, [0, 1, 2])
    assert not any(key.startswith("lost") for key in at_0) and "lost_ratio_R@1" not in plain
    assert plain["lost_R@1"]["mean"] == pytest.approx(11) and full["lost_R@1"]["mean"] == pytest.approx(5)
    assert full["lost_ratio_R@1"]["mean"] == pytest.approx(5 / 11) and full["lost_mAP"]["mean"] == pytest.approx(2.5)
    text = markdown([at_0, plain, full], "plain").splitlines()
    assert "of what plain loses" in text[0] and "R@1 11.0 [" in text[3] and "R@1 0.45 [" in text[4]
    assert [line.count("|") for line in text] == [text[0].count("|")] * 5


def test_where_more_of_a_field_is_better_nothing_is_called_lost() -> None:
    rows = Rows((Row("plain"), Row("full")), "plain", "data.max_objects", (100, 2232))
    found = {Training(row.name, at, 0): metrics(at / 100, 0) for row in rows.rows for at in rows.points}
    table = summarise(rows, found, [0])
    assert "lost" not in (text := markdown(table, "plain")) and len({line.count("|") for line in text.splitlines()}) == 1
    assert plot(table, rows.baseline, rows.over).startswith(b"\x89PNG")


@pytest.mark.parametrize("values", [(0.0, 0.5), ("drop", "swap"), (True, False), (0, 1, "all")])
def test_a_curve_may_be_over_anything(values: tuple) -> None:
    rows = Rows((Row("plain"), Row("full, $1 \\foo$")), "plain", "data.some", values)
    found = {Training(row.name, at, seed): metrics(50, 0) for row in rows.rows for at in values for seed in (0, 1)}
    assert plot(summarise(rows, found, [0, 1]), rows.baseline, rows.over).startswith(b"\x89PNG")


def test_the_interval_of_a_ratio_is_where_its_difference_is_not_told_from_zero() -> None:
    import numpy as np
    from scipy import stats

    own, other = np.array([4.0, 5.0, 6.5]), np.array([10.0, 12.0, 11.0])
    low, high = ratio_interval(own, other)["ci95"]
    for at in (low, high):  # a ratio at the edge is rejected at just 5 %
        assert stats.ttest_1samp(own - at * other, 0.0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert low < own.mean() / other.mean() < high
    assert ratio_interval(own, np.array([10.0, -9.0, 1.0]))["ci95"] is None, "nobody knows whether the other loses at all"
    assert ratio_interval(own[:1], other[:1]) == {"mean": 0.4, "ci95": None}

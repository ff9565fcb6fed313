"""What came of an ablation: means over seeds, paired differences with 95 % intervals, as JSON, Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
from scipy import stats

from mmref.tuning.rows import Row, Rows, Training

METRICS = ("R@1", "mAP")
DIFFERENCES = ("delta", "contribution", "lost")  # how the names of numbers begin that compare rows, or values of `over`
Results = dict[Training, dict[str, Any]]
"""Metrics of evaluated trainings, with `step_seconds`, the median time of a step, and the `machine` that took it."""


def mean_interval(values: np.ndarray) -> dict[str, Any]:
    """{"mean", "ci95"}: Student's t over seeds; no interval (None) for a single one."""
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "ci95": None}
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def ratio_interval(own: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """{"mean", "ci95"}: ratio of the means of paired values, that of the other above 0, with Fieller's interval; None for
    a single pair, or where the other's mean might be 0."""
    n, mean = len(own), float(own.mean() / other.mean())
    if n < 2:
        return {"mean": mean, "ci95": None}
    t2 = float(stats.t.ppf(0.975, n - 1)) ** 2 / n
    (own_var, both), (_, other_var) = np.cov(own, other, ddof=1)
    # The interval holds the ratios r for which the mean of own - r x other cannot be told from 0: a r^2 - 2 b r + c <=
    # 0.
    a, b, c = other.mean() ** 2 - t2 * other_var, own.mean() * other.mean() - t2 * both, own.mean() ** 2 - t2 * own_var
    if a <= 0:
        return {"mean": mean, "ci95": None}
    half = max(0.0, b * b - a * c) ** 0.5
    return {"mean": mean, "ci95": [float((b - half) / a), float((b + half) / a)]}


def summarise(rows: Rows, results: Results, seeds: list[int], kind: str = "") -> list[dict[str, Any]]:
    """A row of the table for each row and value of `over` that has results.

    {"name", "at", "seeds", "R@1": {"mean", "ci95"}, "mAP": ..., "delta_R@1": difference to the baseline, paired by seed, ...,
    "against", "contribution_R@1": difference to the row it names, ..., "step_ratio": time of a step over the baseline's, of
    seeds that the same machine trained}; with
    `over`, "lost_R@1": what the row has less than at the first value, and "lost_ratio_R@1": that over what the baseline loses.
    `kind`: a caption kind that is reported besides all captions, as "<kind> R@1". With `eval.class_protocol` "AP@50" and
    "image top-1" beside them.
    """
    table = []
    for point in rows.points:
        for row in rows.rows:
            own = _per_seed(row, point, results, seeds, kind)
            if not own:
                continue
            entry: dict[str, Any] = {"name": row.name, "at": point, "seeds": sorted(own)}
            entry |= {m: mean_interval(np.array([own[s][m] for s in sorted(own)])) for m in _metrics(own)}
            if row.name != rows.baseline:
                base = _per_seed(rows[rows.baseline], point, results, seeds, kind)
                entry |= _differences("delta", own, base)
            if row.against and row.against in {r.name for r in rows.rows}:
                other = _per_seed(rows[row.against], point, results, seeds, kind)
                entry |= {"against": row.against, **_differences("contribution", own, other)}
            if point != rows.points[0]:
                entry |= _lost(row, rows, point, results, seeds)
            entry["step_ratio"] = _step_ratio(row, rows, point, results, seeds)
            table.append(entry)
    return table


def _lost(row: Row, rows: Rows, point: Any, results: Results, seeds: list[int]) -> dict[str, Any]:
    """What a row loses from the first value of `over` to this one, and how much that is of the baseline's loss."""

    def loss(of: Row) -> dict[int, dict[str, float]]:
        before, after = (_per_seed(of, p, results, seeds, "") for p in (rows.points[0], point))
        return {s: {m: before[s][m] - after[s][m] for m in METRICS} for s in sorted(set(before) & set(after))}

    own, base = loss(row), loss(rows[rows.baseline])
    if not own:
        return {}
    found = {f"lost_{m}": mean_interval(np.array([own[s][m] for s in own])) for m in METRICS}
    shared = sorted(set(own) & set(base))
    if row.name != rows.baseline and shared:
        for m in METRICS:
            less, base_less = (np.array([lost[s][m] for s in shared]) for lost in (own, base))
            if base_less.mean() > 0:
                found[f"lost_ratio_{m}"] = ratio_interval(less, base_less)
    return found


def _per_seed(row: Row, point: Any, results: Results, seeds: list[int], kind: str) -> dict[int, dict[str, float]]:
    """Metrics of a row by seed, of the seeds that are there."""
    found = {}
    for seed in seeds:
        metrics = results.get(Training(row.training, point, seed))
        if metrics:
            state = "refined" if row.refined else "initial"
            found[seed] = {m: float(metrics[state][m]) for m in METRICS}
            if kind in metrics["by_caption_kind"]:
                found[seed] |= {f"{kind} {m}": float(metrics["by_caption_kind"][kind][state][m]) for m in METRICS}
            found[seed] |= metrics.get("class_protocol", {}).get(state, {})
    return found


def _metrics(per_seed: dict[int, dict[str, float]]) -> list[str]:
    """Metrics that every seed has: of captions of some kind there may be none on record."""
    return [m for m in next(iter(per_seed.values())) if all(m in found for found in per_seed.values())]


def _differences(label: str, own: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> dict[str, Any]:
    """{"<label>_R@1": {"mean", "ci95"}, ...} over the seeds that both have; nothing where there is none."""
    shared = sorted(set(own) & set(other))
    if not shared:
        return {}
    metrics = [m for m in _metrics(own) if m in _metrics(other)]
    return {f"{label}_{m}": mean_interval(np.array([own[s][m] - other[s][m] for s in shared])) for m in metrics}


def _step_ratio(row: Row, rows: Rows, point: Any, results: Results, seeds: list[int]) -> float | None:
    """Median over seeds of the time of a step over the baseline's; None without a seed whose times compare."""
    times = []
    for seed in seeds:
        own, base = (results.get(Training(name, point, seed)) for name in (row.training, rows[rows.baseline].training))
        if not own or not base or not (own["step_seconds"] and base["step_seconds"]):
            continue  # starting weights have taken no step
        if own["machine"] and own["machine"] == base["machine"]:
            times.append(own["step_seconds"] / base["step_seconds"])
    return float(np.median(times)) if times else None


def markdown(table: list[dict[str, Any]], baseline: str) -> str:
    """The table as Markdown; differences are in points of all captions, those of a kind and by class are in the other
    files."""
    keys = dict.fromkeys(key for entry in table for key, value in entry.items() if isinstance(value, dict))
    metrics = [key for key in keys if not key.startswith(DIFFERENCES)]
    over = any(entry["at"] is not None for entry in table)
    loses = any(entry["name"] == baseline and entry.get("lost_R@1", {"mean": 0})["mean"] > 0 for entry in table)
    lost = ["lost", f"of what {_cell(baseline)} loses"] if loses else []
    head = ["row", *(["at"] if over else []), *map(_cell, metrics), f"over {_cell(baseline)}", "contribution", *lost, "step time"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in table:
        cells = [_cell(entry["name"]), *([_cell(str(entry["at"]))] if over else [])]
        cells += [f"{entry[m]['mean']:.1f}{_bounds(entry[m], '{:.1f}')}" if m in entry else "" for m in metrics]
        cells.append(_signed_cells(entry, "delta"))
        contribution = _signed_cells(entry, "contribution")
        cells.append(f"{contribution} over {_cell(entry['against'])}" if contribution else "")
        if lost:
            cells.append(_signed_cells(entry, "lost", "{:.1f}"))
            cells.append(_signed_cells(entry, "lost_ratio", "{:.2f}"))
        cells.append("" if entry["step_ratio"] is None else f"{entry['step_ratio']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed_cells(entry: dict[str, Any], label: str, form: str = "{:+.1f}") -> str:
    found = [(m, entry[f"{label}_{m}"]) for m in METRICS if f"{label}_{m}" in entry]
    return ", ".join(f"{m} {form.format(d['mean'])}{_bounds(d, form)}" for m, d in found)


def _bounds(value: dict[str, Any], form: str) -> str:
    return "" if value["ci95"] is None else " [" + ", ".join(form.format(x) for x in value["ci95"]) + "]"


def table_csv(table: list[dict[str, Any]]) -> str:
    """A line a row: means and bounds of every number."""
    names = dict.fromkeys(key for entry in table for key, value in entry.items() if isinstance(value, dict))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "at", "seeds", "step_ratio", *(f"{n} {part}" for n in names for part in ("mean", "low", "high"))])
    for entry in table:
        numbers: list[Any] = []
        for name in names:
            value = entry.get(name)
            numbers += ["", "", ""] if value is None else [value["mean"], *(value["ci95"] or ("", ""))]
        at, ratio = ("" if entry[key] is None else entry[key] for key in ("at", "step_ratio"))
        writer.writerow([entry["name"], at, " ".join(map(str, entry["seeds"])), ratio, *numbers])
    return out.getvalue()


def _cell(text: str) -> str:
    """A text in a cell of a table in Markdown."""
    return text.replace("|", "\\|")


def plot(table: list[dict[str, Any]], baseline: str, over: str) -> bytes:
    """PNG of R@1: a point with its interval for each row, and its difference to the baseline; or a curve a row over the values
    of a field, and of its differences."""
    from mmref.evaluate.plotting import own_style

    with own_style(**{"text.parse_math": False}):  # a row may be called what it costs in $
        return _plot(table, baseline, over)


def _plot(table: list[dict[str, Any]], baseline: str, over: str) -> bytes:
    from matplotlib.figure import Figure

    compared = any("delta_R@1" in entry for entry in table)
    figure = Figure(figsize=(9 if compared else 7, 4.5 if over else 0.4 * len(table) + 1.4), layout="constrained")
    axes, *others = figure.subplots(1, 2 if compared else 1, squeeze=False, sharey=not over)[0]
    for side in ("top", "right"):
        for panel in (axes, *others):
            panel.spines[side].set_visible(False)
    if over:
        _curves(axes, table, "R@1", over, "R@1, percent; 95 % over seeds")
        axes.legend(frameon=False)
        if compared:
            _curves(others[0], table, "delta_R@1", over, f"R@1, points over {baseline}, paired by seed")
            others[0].axhline(0.0, color="grey", linewidth=0.8)
    else:
        names = [entry["name"] for entry in table]
        _points(axes, names, [entry["R@1"] for entry in table], "R@1, percent; 95 % over seeds")
        if compared:
            # The baseline is at 0; a row that shares no seed with it has no point.
            values = [
                entry.get("delta_R@1", {"mean": 0.0 if entry["name"] == baseline else math.nan, "ci95": None}) for entry in table
            ]
            _points(others[0], names, values, f"points over {baseline}, paired by seed")
            others[0].axvline(0.0, color="grey", linewidth=0.8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _curves(axes: Any, table: list[dict[str, Any]], number: str, over: str, label: str) -> None:
    """A curve of a number for each row that has it, in the color of its place among all rows. Values that are not all numbers
    stand side by side."""
    values = list(dict.fromkeys(entry["at"] for entry in table))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    at = {value: value if numbers else i for i, value in enumerate(values)}
    for place, name in enumerate(dict.fromkeys(entry["name"] for entry in table)):
        own = [entry for entry in table if entry["name"] == name and number in entry]
        axes.errorbar(
            [at[entry["at"]] for entry in own], [entry[number]["mean"] for entry in own],
            yerr=[_half(entry[number]) for entry in own], marker="o", capsize=3, label=name, color=f"C{place}",
        )  # fmt: skip
    if not numbers:
        axes.set_xticks(list(at.values()), [str(value) for value in values])
    elif min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
    axes.set_xlabel(over)
    axes.set_ylabel(label)


def _points(axes: Any, names: list[str], values: list[dict[str, Any]], label: str) -> None:
    """A row of the figure for each value, from the top down."""
    at = list(range(len(names)))[::-1]
    axes.errorbar([v["mean"] for v in values], at, xerr=[_half(v) for v in values], fmt="o", capsize=3)
    axes.set_yticks(at, names)
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.4)


def _half(value: dict[str, Any]) -> float:
    """Half the width of an interval, 0 without one."""
    bounds = value["ci95"]
    return 0.0 if bounds is None else (bounds[1] - bounds[0]) / 2

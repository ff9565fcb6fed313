"""The figures of a sweep's report, as inline SVG; None where there is nothing to draw."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mmref.evaluate.plotting import FAINT, INK, PAGE, axes_of, legend, plain, to_svg
from mmref.tuning.results import short
from mmref.tuning.search import study
from mmref.tuning.space import Parameter, Space
from mmref.tuning.trial_log import SETTINGS, Trial, pareto_front

BLUE, ORANGE, GREEN, PURPLE = (f"#0{i}0000" for i in range(1, 5))  # the page's series
IMPORTANCE_TRIALS = 8  # fewer say nothing
BETTER_HALF = 0.5


def history(trials: list[Trial], metric: str) -> Markup | None:
    """The score of every trial in order, and the best so far."""
    scored = sorted((t for t in trials if t.score is not None), key=lambda t: t.number)
    if not scored:
        return None
    figure, axes = axes_of("trial", f"val {metric}")
    sound = [t for t in scored if t.status != "failed"]
    axes.step([t.number for t in sound], _running_best(sound), where="post", color=BLUE, linewidth=1.8, label="best so far")
    for status, marker, colour, filled in (
        ("finished", "o", BLUE, True), ("stopped-early", "o", ORANGE, False), ("failed", "X", PURPLE, True),
        ("interrupted", "s", GREEN, False),
    ):  # fmt: skip
        chosen = [t for t in scored if t.status == status]
        if chosen:
            axes.plot([t.number for t in chosen], [t.score for t in chosen], marker, color=colour, markersize=6,
                      fillstyle="full" if filled else "none", label=status)  # fmt: skip
    axes.margins(x=0.05)
    legend(axes)
    return to_svg(figure, "history")


def _running_best(trials: list[Trial]) -> np.ndarray:
    return np.maximum.accumulate(np.array([t.score for t in trials], dtype=float))


def curves(trials: list[Trial], leader: Trial | None, default: Trial | None, metric: str) -> Markup | None:
    """Score over steps of every trial; a cross where it was stopped."""
    drawn = [t for t in trials if t.results]
    if not drawn:
        return None
    figure, axes = axes_of("step", f"val {metric}")
    for trial in sorted(drawn, key=lambda t: (t is leader, t is default)):
        steps, scores = [r["step"] for r in trial.results], [r["score"] for r in trial.results]
        style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.0, "alpha": 0.55}
        if trial is leader:
            style = {
                "color": BLUE,
                "linewidth": 2.4,
                "label": f"best (trial {trial.number})",
                "marker": "o",
                "markersize": 4,
            }
        elif trial is default:
            style = {"color": INK, "linewidth": 1.8, "linestyle": "--", "label": f"default (trial {trial.number})"}
        axes.plot(steps, scores, **style)
    stopped = [t.results[-1] for t in drawn if t.status == "stopped-early"]
    if stopped:
        axes.plot([r["step"] for r in stopped], [r["score"] for r in stopped], "x", color=ORANGE, markersize=7,
                  markeredgewidth=1.8, label=f"stopped ({len(stopped)})")  # fmt: skip
    failed = [t.results[-1] for t in drawn if t.status == "failed"]
    if failed:
        axes.plot([r["step"] for r in failed], [r["score"] for r in failed], "X", color=PURPLE, markersize=7,
                  label=f"failed ({len(failed)})")  # fmt: skip
    axes.set_xlim(left=0)
    legend(axes, columns=2)
    return to_svg(figure, "curves")


def importances(space: Space, scored: list[Trial]) -> dict[str, float] | None:
    """Share of each field in what sets the better half of the trials apart (PED-ANOVA), None for too few trials.

    Trials are ordered as ASHA judged them: by the step they reached, then by score.
    """
    if len(scored) < IMPORTANCE_TRIALS or len(space.parameters) < 2:
        return None
    try:
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    except ImportError:  # random and grid search do without it
        return None
    order = sorted(scored, key=lambda t: (t.steps, t.score))
    places = [Trial(t.number, t.values, "finished", [{"step": 1, "score": float(place)}]) for place, t in enumerate(order)]
    found = get_param_importances(study(space, places), evaluator=PedAnovaImportanceEvaluator(target_quantile=BETTER_HALF))
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def bars(shares: dict[str, float]) -> Markup:
    """Horizontal bars, the largest on top."""
    names = sorted(shares, key=lambda name: shares[name])
    figure = Figure(figsize=(5.6, 0.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    plain(axes, "share", "")
    axes.grid(visible=False)
    axes.barh(names, [shares[n] for n in names], color=BLUE, height=0.62)
    for place, name in enumerate(names):
        axes.annotate(f"{shares[name]:.2f}", (shares[name], place), xytext=(4, 0), textcoords="offset points",
                      va="center", color=INK, fontsize=9)  # fmt: skip
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return to_svg(figure, "importances")


def place(parameter: Parameter, value: Any) -> float:
    """Where a value lies on its field's axis, from 0 to 1: choices evenly apart, loguniform by its logarithm."""
    if parameter.kind == "choice":
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    low, high = parameter.low, parameter.high
    if parameter.kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Places and labels of a field's axis."""
    values = parameter.values if parameter.kind == "choice" else (parameter.low, parameter.high)
    return [(place(parameter, v), short(v)) for v in values]


def parallel(space: Space, scored: list[Trial], metric: str) -> Markup | None:
    """A line a trial through its values, coloured by score; the best on top."""
    if len(scored) < 2 or len(space.parameters) < 2:
        return None
    parameters = space.parameters
    figure = Figure(figsize=(11.5, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    low, high = min(t.score or 0 for t in scored), max(t.score or 0 for t in scored)
    spread = (high - low) or 1.0
    colours = mpl.colormaps["plasma"]
    for trial in sorted(scored, key=lambda t: t.score or 0):
        share = ((trial.score or 0) - low) / spread
        ys = [*(place(p, trial.values[p.name]) for p in parameters), share]
        axes.plot(range(len(ys)), ys, color=colours(0.7 * (1 - share)), linewidth=1 + 2 * share, alpha=0.5 + 0.5 * share)
    for x, parameter in enumerate(parameters):
        axes.axvline(x, color=FAINT, linewidth=1)
        for y, text in ticks(parameter):
            _mark(axes, text, x, y)
    last = len(parameters)
    axes.axvline(last, color=INK, linewidth=1)
    for y, value in ((0, low), (1, high)):
        _mark(axes, f"{value:.1f}", last, y)
    axes.set_xticks(range(last + 1), [*(p.name.replace(".", ".\n", 1) for p in parameters), f"val\n{metric}"])
    axes.tick_params(axis="x", colors=INK, length=0, labelsize=8.5, pad=8)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylim(-0.05, 1.05)
    axes.margins(x=0.03)
    return to_svg(figure, "parallel")


def _mark(axes: Any, text: str, x: float, y: float) -> None:
    """A value beside its axis, readable over the lines."""
    box = {"facecolor": PAGE, "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", color=INK, fontsize=8.5, va="center", bbox=box)


def slices(parameters: list[Parameter], scored: list[Trial], metric: str) -> Markup:
    """A panel a field: score over its values; hollow where the trial was stopped early."""
    columns = min(3, len(parameters))
    rows = -(-len(parameters) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.5 * rows), layout="constrained")
    for i, parameter in enumerate(parameters):
        axes = figure.add_subplot(rows, columns, i + 1)
        plain(axes, parameter.name, f"val {metric}" if i % columns == 0 else "")
        for trial in scored:
            full = trial.status == "finished"
            x = trial.values[parameter.name]
            axes.plot([place(parameter, x) if parameter.kind == "choice" else x], [trial.score or 0], "o", markersize=6,
                      color=BLUE if full else ORANGE, fillstyle="full" if full else "none")  # fmt: skip
        if parameter.kind == "choice":
            axes.set_xticks([y for y, _ in ticks(parameter)], [text for _, text in ticks(parameter)])
            axes.set_xlim(-0.3, 1.3)
        elif parameter.kind == "loguniform":
            axes.set_xscale("log")
            axes.set_xticks(list(np.geomspace(parameter.low, parameter.high, 4)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
            edge = (parameter.high / parameter.low) ** 0.08
            axes.set_xlim(parameter.low / edge, parameter.high * edge)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=parameter.kind == "int"))
            edge = 0.08 * (parameter.high - parameter.low)
            axes.set_xlim(parameter.low - edge, parameter.high + edge)
    return to_svg(figure, f"slices-{parameters[0].name}")


def refinement_gain(scored: list[Trial]) -> Markup | None:
    """What refinement adds to R@1 and mAP in the best evaluation of each trial, over its chosen weight."""
    chosen = [t for t in scored if "val_refined_mAP" in t.best]
    if not chosen:
        return None
    figure, axes = axes_of("refinement weight found", "points gained on val")
    weights = sorted({t.refinement.get("weight", 0.0) for t in chosen})
    for metric, colour, marker, shift in (("R@1", BLUE, "o", -0.08), ("mAP", ORANGE, "s", 0.08)):
        xs = [weights.index(t.refinement.get("weight", 0.0)) + shift for t in chosen]
        ys = [t.best[f"val_refined_{metric}"] - t.best[f"val_{metric}"] for t in chosen]
        axes.plot(xs, ys, marker, color=colour, markersize=6, alpha=0.8, label=metric)
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.set_xticks(range(len(weights)), [short(w) for w in weights])
    axes.set_xlim(-0.5, len(weights) - 0.5)
    legend(axes)
    return to_svg(figure, "refinement")


def refinement_slices(scored: list[Trial], leader: Trial | None, metric: str) -> Markup | None:
    """A panel a setting of the refinement: what the best refinement with each of its values adds, a line a trial."""
    gains = {t.number: t.best["val_refine_gain"] for t in scored if t.best.get("val_refine_gain")}
    values = {name: _in_order({v for g in gains.values() for v in g.get(name, {})}) for name in SETTINGS}
    names = [name for name in SETTINGS if len(values[name]) > 1]
    if not names:
        return None
    figure = Figure(figsize=(2.9 * len(names), 2.6), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        plain(axes, f"refinement {name}", f"points of {metric} gained" if i == 0 else "")
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, gain in sorted(gains.items(), key=lambda item: leader is not None and item[0] == leader.number):
            best = leader is not None and number == leader.number
            xs = [x for x, value in enumerate(values[name]) if value in gain.get(name, {})]
            axes.plot(xs, [gain[name][values[name][x]] for x in xs], "o-", markersize=5 if best else 3,
                      color=BLUE if best else ORANGE, linewidth=2.4 if best else 1, alpha=1 if best else 0.55)  # fmt: skip
        axes.set_xticks(range(len(values[name])), values[name])
        axes.margins(x=0.12)
    return to_svg(figure, "refinement-slices")


def _in_order(values: set[str]) -> list[str]:
    """Numbers by size, words by the alphabet."""
    return sorted(values, key=lambda v: (float(v), v) if v[0].isdigit() else (0.0, v))


def pareto(trials: list[Trial], metric: str) -> Markup | None:
    """Score over the time of a step of trials that ran to their end, and those that no other beats in both."""
    known = [t for t in trials if t.status == "finished" and t.score is not None and t.step_seconds is not None]
    if len(known) < 2:
        return None
    figure, axes = axes_of("seconds a step (median)", f"val {metric}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    front = pareto_front(trials)
    axes.plot([t.step_seconds for t in known], [t.score for t in known], "o", color=ORANGE, fillstyle="none", markersize=6,
              label="finished")  # fmt: skip
    axes.plot([t.step_seconds for t in front], [t.score for t in front], "o-", color=BLUE, markersize=6, linewidth=1.6,
              label="front, with the number of the trial")  # fmt: skip
    for trial in front:
        axes.annotate(f"{trial.number}", (trial.step_seconds, trial.score), xytext=(6, -10), color=INK, fontsize=8.5,
                      textcoords="offset points")  # fmt: skip
    axes.margins(0.12)
    legend(axes)
    return to_svg(figure, "pareto")

"""The report of a sweep: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

import mmref.evaluate
from mmref.config import Config
from mmref.evaluate.plotting import own_style
from mmref.tuning import sweep_figures
from mmref.tuning.results import refinement_text, short, short_names, steps_text
from mmref.tuning.space import Space
from mmref.tuning.trial_log import Trial, best_of, pareto_front, ranked

GROUPS = {"references": "reference.", "loss weights and temperatures": "loss.", "other fields": ""}


@own_style()
def render_sweep(trials: list[Trial], space: Space, config: Config, title: str, final: list[dict[str, Any]] | None = None) -> str:
    """The report as HTML that loads nothing from anywhere.

    Args:
        config: of the trials.
        final: rows of `mmref.tuning.final.compare`, where it was made.
    """
    templates = [Path(__file__).parent / "templates", Path(mmref.evaluate.__path__[0]) / "templates"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "refinement": refinement_text}
    names = [p.name for p in space.parameters]
    scored = [t for t in trials if t.score is not None and t.status != "failed"]
    own = space.default_point(config)
    default = next((t for t in scored if own is not None and t.values == own), None)
    leader = best_of(trials)
    counted = sweep_figures.importances(space, scored)
    return environment.get_template("sweep.html.j2").render(
        title=title,
        metric=config.eval.metric,
        max_steps=config.train.max_steps,
        trials=ranked(trials),
        names=names,
        headers=short_names(names),
        leader=leader,
        default=default,
        counts=[(status, sum(t.status == status for t in trials)) for status in dict.fromkeys(t.status for t in trials)],
        steps=steps_text(trials, config.train.max_steps),
        front={t.number for t in pareto_front(trials)},
        own=space.own_values(config),
        history=sweep_figures.history(trials, config.eval.metric),
        curves=sweep_figures.curves(trials, leader, default, config.eval.metric),
        importances=sweep_figures.bars(counted) if counted else None,
        scored=len(scored),
        parallel=sweep_figures.parallel(space, scored, config.eval.metric),
        slices=[
            (group, sweep_figures.slices(members, scored, config.eval.metric))
            for group, members in grouped(space).items()
        ] if scored else [],
        refinement=sweep_figures.refinement_gain(scored),
        refinement_slices=sweep_figures.refinement_slices(scored, leader, config.eval.metric),
        pareto=sweep_figures.pareto(trials, config.eval.metric),
        final=final,
    )  # fmt: skip


def grouped(space: Space) -> dict[str, list[Any]]:
    """The fields of a space by what they are about; groups without any are left out."""
    left, found = list(space.parameters), {}
    for group, prefix in GROUPS.items():
        members = [p for p in left if p.name.startswith(prefix)]
        left = [p for p in left if p not in members]
        if members:
            found[group] = members
    return found

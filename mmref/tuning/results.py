"""What a sweep leaves behind besides its log: trials.parquet, best.yaml, the table on the terminal."""

from __future__ import annotations

import io
from typing import Any

from mmref.config import Config, dump_yaml
from mmref.tuning.trial_log import SETTINGS, Trial, pareto_front, ranked

METRICS = ("val_R@1", "val_mAP", "val_refined_R@1", "val_refined_mAP")


def trials_parquet(trials: list[Trial], names: list[str]) -> bytes:
    """A row a trial: number, status, best score with its metrics, values, refinement, step, steps, seconds, whether it is
    on the Pareto front of score and time of a step, error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    front = {t.number for t in pareto_front(trials)}
    columns = {name: _of_one_type({t.number: t.values[name] for t in trials}) for name in names}
    rows = [
        {
            "trial": t.number, "status": t.status, "score": t.score, **{m: t.best.get(m) for m in METRICS},
            **{name: columns[name][t.number] for name in names},
            **{f"refinement.{s}": t.refinement.get(s) for s in SETTINGS},
            "best_step": t.best.get("step"), "steps": t.steps, "seconds": t.seconds, "step_seconds": t.step_seconds,
            "pareto": t.number in front, "error": t.error,
        }
        for t in sorted(trials, key=lambda t: t.number)
    ]  # fmt: skip
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _of_one_type(values: dict[int, Any]) -> dict[int, Any]:
    """Values of a field by trial as one column holds them: all as text where some are words and others numbers."""
    words = [isinstance(value, str) for value in values.values()]
    return {n: str(value) for n, value in values.items()} if any(words) and not all(words) else values


def best_yaml(config: Config, trial: Trial, metric: str, trial_steps: int) -> str:
    """The best trial's config as `mmref train --config` takes it, with where it comes from in comments."""
    r = trial.refinement
    found = ", ".join(f"{k} {short(v)}" for k, v in r.items()) if r.get("weight") else "none helped"
    head = [
        f"The best of a sweep: trial {trial.number}, val {metric} {trial.score:.2f} at step {trial.best['step']} of its "
        f"{trial_steps}.",
        f"Refinement there: {found}. It is chosen again on val from the grid in `eval` when this config is trained.",
        *(f"  {name} = {short(value)}" for name, value in trial.values.items()),
    ]
    return "".join(f"# {line}\n" for line in head) + dump_yaml(config)


def refinement_text(trial: Trial) -> str:
    """The refinement of a trial's best evaluation in a word or two."""
    r = trial.refinement
    return f"{r['kind']} {short(r['weight'])}" if "kind" in r else "none"


def format_trials(trials: list[Trial], names: list[str], max_steps: int) -> str:
    """The table at the end, best first, with the steps that early stops saved."""
    header = ["trial", "status", "score", *short_names(names), "refinement", "steps", "s/step", "seconds"]
    front = {t.number for t in pareto_front(trials)}
    rows = [
        [
            f"{t.number}{'*' if t.number in front else ''}",
            t.status,
            "-" if t.score is None else f"{t.score:.2f}",
            *(short(t.values[n]) for n in names),
            refinement_text(t),
            str(t.steps),
            "-" if t.step_seconds is None else short(t.step_seconds),
            f"{t.seconds:.0f}",
        ]
        for t in ranked(trials)
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines += [f"trial {t.number}: {t.error}" for t in ranked(trials) if t.error]
    if front:
        lines.append("* no finished trial is better in score and time of a step at once")
    return "\n".join([*lines, steps_text(trials, max_steps)])


def steps_text(trials: list[Trial], max_steps: int) -> str:
    """The steps run against those of trials that all ran to their end."""
    done, full = sum(t.steps for t in trials), len(trials) * max_steps
    return f"{done} steps run, {full} had every trial run to its end ({done / max(full, 1):.0%})"


def short_names(names: list[str]) -> list[str]:
    """The last part of each field's name, the whole name where another field ends alike."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return [tail if last.count(tail) == 1 else name for tail, name in zip(last, names)]


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Does MMRef help? Align-only against full MMRef on one config, several seeds, equal steps and equal time.

    python benchmarks/ablate.py --config configs/emoji.yaml --steps 400 --seeds 0 1 2 --out runs/ablation

Each run is the whole job (Ray Data, Ray Train, DeepSpeed, evaluation on val then test). Runs that are finished are not
repeated, so the command resumes. `summary.json` and `summary.md` hold the means, the paired differences per seed and
their 95 % intervals (Student's t over seeds).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ALIGN_ONLY = ["--loss.w_guide", "0", "--loss.w_fuse", "0", "--loss.w_rec", "0"]
ROWS: dict[str, tuple[list[str], bool]] = {  # name -> (flags, whether it gets the extra steps of equal time)
    "align-only": (ALIGN_ONLY, False),
    "align-only, equal time": (ALIGN_ONLY, True),
    "MMRef": ([], False),
    "MMRef + reconstruction": (["--loss.w_rec", "0.2"], False),
}
METRICS = ("R@1", "mAP")


def run_one(name: str, seed: int, args: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Metrics of one run, trained now unless it is already there."""
    flags, extra = ROWS[name]
    steps = round(args.steps * args.time_ratio) if extra else args.steps
    folder = Path(args.out) / f"{name.replace(' ', '-').replace(',', '').replace('+', 'and')}-seed{seed}"
    if not (folder / "metrics.json").exists():
        from mmref.config import load_config
        from mmref.train.trainer import train

        argv = ["--config", args.config, *passed, *flags, "--run_dir", str(folder), "--train.seed", str(seed)]
        argv += ["--train.max_steps", str(steps), "--train.eval_every", str(max(1, steps // 2))]
        train(load_config(argv))
    metrics = json.loads((folder / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics["step_seconds"] = float(np.median([r["step_seconds"] for r in lines if "step_seconds" in r][1:]))
    return metrics


def values(metrics: dict[str, Any], refined: bool, kind: str) -> dict[str, float]:
    """R@1 and mAP of all captions and of one kind."""
    state = "refined" if refined else "initial"
    found = {m: metrics[state][m] for m in METRICS}
    if kind in metrics["by_caption_kind"]:
        found |= {f"{kind} {m}": metrics["by_caption_kind"][kind][state][m] for m in METRICS}
    return found


def interval(differences: np.ndarray) -> tuple[float, list[float] | None]:
    """Mean and 95 % interval by Student's t; no interval for a single seed."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5)
    return mean, [mean - half, mean + half]


def summarise(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """Rows with means, and differences to align-only at equal steps (and, for MMRef refined, at equal time)."""
    table = []
    rows = [(name, refined) for name in results for refined in ((False, True) if "MMRef" in name else (False,))]
    for name, refined in rows:
        per_seed = [values(m, refined, args.kind) for m in results[name]]
        row: dict[str, Any] = {"name": name + (" + refinement" if refined else "")}
        for metric in per_seed[0]:
            column = np.array([v[metric] for v in per_seed])
            row[metric] = {"mean": float(column.mean()), "seeds": column.round(2).tolist()}
            for base in ("align-only", "align-only, equal time"):
                if base in results and name != base and "MMRef" in name:
                    other = np.array([values(m, False, args.kind)[metric] for m in results[base]])
                    mean, ci95 = interval(column - other)
                    row[metric][f"over {base}"] = {"mean": mean, "ci95": ci95}
        table.append(row)
    return {"split": "test", "seeds": args.seeds, "steps": args.steps, "config": args.config, "rows": table}


def markdown(summary: dict[str, Any]) -> str:
    """The table as Markdown."""
    metrics = [k for k in summary["rows"][0] if k != "name"]
    lines = ["| row | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for row in summary["rows"]:
        cells = []
        for metric in metrics:
            cell = f"{row[metric]['mean']:.1f}"
            for base, label in (("over align-only", "steps"), ("over align-only, equal time", "time")):
                if base in row[metric]:
                    d = row[metric][base]
                    bounds = f" [{d['ci95'][0]:+.1f}, {d['ci95'][1]:+.1f}]" if d["ci95"] else ""
                    cell += f"; equal {label} {d['mean']:+.1f}{bounds}"
            cells.append(cell)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.yaml")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[:3], choices=list(ROWS))
    parser.add_argument(
        "--time-ratio", type=float, default=1.1, help="extra steps of the equal-time row, from benchmarks/step.py"
    )
    parser.add_argument("--kind", default="standard", help="caption kind reported beside all captions")
    parser.add_argument("--out", default="runs/ablation")
    args, passed = parser.parse_known_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.rows}
    for seed in args.seeds:
        for name in args.rows:
            results[name].append(run_one(name, seed, args, passed))
    summary = summarise(results, args)
    Path(args.out, "summary.json").write_text(json.dumps(summary, indent=1))
    Path(args.out, "summary.md").write_text(markdown(summary) + "\n")
    print(markdown(summary))


if __name__ == "__main__":
    main()

"""`mmref tune` and `mmref ablate`: options in. Their modules are imported behind the options: they need the extra `train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mmref.config import load_config
from mmref.data.epochs import in_steps
from mmref.errors import ConfigError
from mmref.extras import need
from mmref.storage.locations import expanded
from mmref.terminal.arguments import amount, count, positive
from mmref.terminal.parser import Parser
from mmref.tuning.options import AUTO, FINAL_SEEDS, RESUMABLE, SEARCHERS, Options, number
from mmref.tuning.rows import read_rows
from mmref.tuning.space import read_space, with_values

# Of those that come with mmref.
DEFAULT_CONFIG, DEFAULT_SPACE, DEFAULT_ROWS = "emoji", "default", "default"


def tune_parser() -> Parser:
    """The sweep's own flags; everything else on the command line goes to the config."""
    parser = Parser(
        prog="mmref tune", allow_abbrev=False, description="Search hyper-parameters with Ray Tune.",
        epilog="Any config field is a flag too (`--train.max_steps 200`): `mmref train --help` lists them.",
    )  # fmt: skip
    parser.add_argument(
        "--space", default=DEFAULT_SPACE, type=expanded, metavar="FILE|NAME", help="search space (default: %(default)s)"
    )
    parser.add_argument("--trials", type=positive, metavar="N", help="number of trials (default: 16; grid: all combinations)")
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        type=expanded,
        metavar="FILE|NAME",
        help="config that the trials vary (default: %(default)s)",
    )
    parser.add_argument(
        "--run_dir", default="runs/sweep", type=expanded, metavar="DIR", help="directory or URL (default: %(default)s)"
    )
    parser.add_argument("--resume", type=expanded, metavar="DIR",
                        help="go on with the sweep in DIR; --trials, --max-concurrent, --final-seeds may change")  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again")
    parser.add_argument("--workers-per-trial", type=positive, metavar="N", help="the same as --train.workers")
    parser.add_argument("--max-concurrent", type=_concurrency, default=None, metavar="N|auto",
                        help="trials at a time; auto (default): as many as the cluster's CPUs and GPUs hold")  # fmt: skip
    parser.add_argument("--searcher", choices=SEARCHERS, default="optuna", help="default: optuna (TPE)")
    parser.add_argument("--scheduler", choices=["asha", "none", "pbt"], default="asha",
                        help="default: asha (early stops); pbt is refused, and says why")  # fmt: skip
    parser.add_argument("--pareto", action="store_true",
                        help="search for a high score and a short step at once (optuna, --scheduler none)")  # fmt: skip
    parser.add_argument("--trial-steps", type=positive, metavar="N",
                        help="length of a trial (default: train.max_steps); best.yaml keeps train.max_steps")  # fmt: skip
    parser.add_argument("--grace-steps", type=positive, metavar="N",
                        help="steps before ASHA may stop a trial (default: until guidance has its full weight, "
                             "loss.guide_full, and at least a quarter of a trial)")  # fmt: skip
    parser.add_argument("--reduction", type=amount, default=3.0, metavar="R",
                        help="ASHA lets about the best 1/R pass each rung (default: %(default)g)")  # fmt: skip
    parser.add_argument("--final-seeds", type=count, metavar="N",
                        help="fresh seeds for which the best config and the default are trained in full and compared on "
                        f"test at the end; 0: not at all (default: {FINAL_SEEDS})")  # fmt: skip
    return parser


def tune_main(argv: Sequence[str]) -> int:
    """`mmref tune` and tune/sweep.py. Raises the errors of mmref.errors."""
    parser = tune_parser()
    args, rest = parser.parse_known_args(argv)
    need("tune", "mmref tune", "ray", "deepspeed")
    from mmref.tuning.sweep import resume, sweep

    if args.resume:
        allowed = {"resume", "retry_failed", *RESUMABLE}
        if extra := rest or [k for k, v in vars(args).items() if k not in allowed and v != parser.get_default(k)]:
            raise ConfigError(
                f"`--resume` goes on with the sweep as it was asked for, and takes no `{extra[0]}`; only `--trials`, "
                "`--max-concurrent` and `--final-seeds` may change, and `--retry-failed` runs failed trials again."
            )
        resume(args.resume, args.retry_failed, **{name: getattr(args, name) for name in RESUMABLE})
        return 0
    if args.retry_failed:
        raise ConfigError("`--retry-failed` goes with `--resume DIR`: a new sweep has no failed trials.")
    base = in_steps(load_config(["--config", args.config, *rest]))
    base.run_dir = args.run_dir
    if args.workers_per_trial:
        base = with_values(base, {"train.workers": args.workers_per_trial})
    space = read_space(args.space)
    trials = args.trials or (len(space.grid()) if args.searcher == "grid" else 16)
    seeds = FINAL_SEEDS if args.final_seeds is None else args.final_seeds
    if args.scheduler != "asha" and (args.grace_steps or args.reduction != parser.get_default("reduction")):
        raise ConfigError("`--grace-steps` and `--reduction` are ASHA's: leave them out, or use `--scheduler asha`.")
    names = {f.name for f in dataclasses.fields(Options)} - {"trials", "final_seeds", "max_concurrent"}
    given = {k: v for k, v in vars(args).items() if k in names}
    sweep(base, space, Options(trials, final_seeds=seeds, max_concurrent=number(args.max_concurrent), **given))
    return 0


def ablate_parser() -> Parser:
    """The ablation's own flags; everything else on the command line goes to the config."""
    parser = Parser(
        prog="mmref ablate", allow_abbrev=False, description="Train rows of configs over seeds, and compare them.",
        epilog="Any config field is a flag too (`--data.caption_noise 0.2`): `mmref train --help` lists them.",
    )  # fmt: skip
    parser.add_argument(
        "--rows", default=DEFAULT_ROWS, type=expanded, metavar="FILE|NAME", help="rows to compare (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW",
                        help="train these rows, and the baseline; of the others the tables show what is there")  # fmt: skip
    parser.add_argument("--baseline", metavar="ROW", help="row that all are compared with (default: the file's)")
    parser.add_argument("--config", type=expanded, metavar="FILE|NAME", help="config that the rows vary")
    parser.add_argument("--seeds", type=count, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--split", default="test", help="split reported; refinement is chosen on val (default: %(default)s)")
    parser.add_argument("--kind", default="", help="kind of captions reported besides all of them")
    parser.add_argument(
        "--run_dir",
        default="runs/ablation",
        type=expanded,
        metavar="DIR",
        help="directory or URL (default: %(default)s)",
    )
    parser.add_argument("--results", nargs="+", default=[], type=expanded, metavar="FILE",
                        help="ablation.json of other ablations: same config and seed, same training: taken from it")  # fmt: skip
    parser.add_argument("--max-concurrent", type=positive, metavar="N", help="trainings at a time (default: as many as fit)")
    return parser


def ablate_main(argv: Sequence[str]) -> int:
    """`mmref ablate` and tune/ablate.py. Raises the errors of mmref.errors."""
    args, rest = ablate_parser().parse_known_args(argv)
    need("train", "mmref ablate")
    from mmref.tuning.ablate import ablate
    from mmref.tuning.ablation_table import markdown

    base = in_steps(load_config([*(["--config", args.config] if args.config else []), *rest]))
    base.run_dir = args.run_dir
    rows = read_rows(args.rows, base)
    if args.baseline:
        rows = rows.compared_with(args.baseline, "--baseline")
    table = ablate(base, rows, args.seeds, args.split, args.kind, args.max_concurrent, args.only, args.results)
    print(markdown(table, rows.baseline))
    return 0


def _concurrency(text: str) -> int | str:
    return text if text == AUTO else positive(text)

"""Does each fault to a run on a small cluster once, and prints what it cost: `make chaos`.

Time of recovery: from the fault to the first step beyond the one at the fault. Lost and repeated: samples of the run's
ledger against its plan. The scenarios are those of tests/integration/test_failures.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.scenarios import Outcome, run_all
from support.tiny_set import build_tiny_set

ROW = "{:<36} {:>13} {:>6} {:>9}  {:<6}  {}"


def show(outcome: Outcome) -> None:
    """One row of the table."""
    seconds = "" if outcome.recovered_s is None else f"{outcome.recovered_s:.1f}"
    verdict = "passed" if outcome.passed else "FAILED"
    print(
        ROW.format(outcome.fault, seconds, outcome.samples_lost, outcome.samples_repeated, verdict, outcome.remark),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/chaos/chaos.json", help="where the table goes as JSON")
    out = Path(parser.parse_args().out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(ROW.format("fault", "recovered (s)", "lost", "repeated", "", ""))
    with tempfile.TemporaryDirectory(prefix="mmref-chaos-set-") as folder:
        outcomes = run_all(build_tiny_set(Path(folder) / "set"), show)
    out.write_text(json.dumps([o.to_dict() for o in outcomes], indent=1))
    print(f"written to {out}")
    return 0 if all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

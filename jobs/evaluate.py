"""Evaluate a run: `python jobs/evaluate.py --checkpoint RUN --data SHARDS --split test --out metrics.json`."""

import argparse
import sys

from mmref.cli import add_evaluate, evaluate, run_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_evaluate(parser)
    args = parser.parse_args()
    sys.exit(run_command(lambda: evaluate(args)))

"""Make a search index: `python jobs/index.py IMAGES --model RUN --out INDEX`; `add`, `remove`, `info` as in `mmref index`."""

import sys

from mmref.cli import run_command
from mmref.retrieval.commands import index_main

if __name__ == "__main__":
    sys.exit(run_command(lambda: index_main(sys.argv[1:])))

"""Make a search index: `python jobs/index.py IMAGES --model RUN --out INDEX`; `add`, `remove`, `info` as in `mmref index`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))

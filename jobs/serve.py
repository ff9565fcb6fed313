"""Serve search indexes: `python jobs/serve.py INDEX [INDEX ...] --host 0.0.0.0 --replicas 4`, options as in `mmref serve`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))

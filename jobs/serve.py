"""Serve search indexes: `python jobs/serve.py INDEX [INDEX ...] --host 0.0.0.0 --replicas 4`, options as in `mmref serve`."""

import sys

from mmref.cli import run_command
from mmref.retrieval.service.server import serve_main

if __name__ == "__main__":
    sys.exit(run_command(lambda: serve_main(sys.argv[1:])))

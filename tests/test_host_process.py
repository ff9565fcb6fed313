"""Importing mmref, as a notebook or a service of somebody else does, leaves that process as it was."""

from __future__ import annotations

import subprocess
import sys

# Settings of a process, before and after what mmref offers is imported.
PROGRAM = """
import logging, os, signal
import cv2, faiss, torch
cv2.setNumThreads(3)
faiss.omp_set_num_threads(3)
torch.set_num_threads(3)

def settings():
    return {
        "OpenCV": (cv2.getNumThreads(), cv2.utils.logging.getLogLevel()),
        "faiss": faiss.omp_get_max_threads(),
        "torch": (torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "environment": dict(os.environ),
        "log": (logging.getLogger().level, logging.getLogger().handlers[:]),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    }

before = settings()
import mmref
mmref.Searcher, mmref.load, mmref.build_index, mmref.train, mmref.evaluate
import mmref.evaluate.evaluation, mmref.export.model, mmref.export.write, mmref.retrieval.index
import mmref.shards.build, mmref.train.trainer
after = settings()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
"""


def test_importing_mmref_changes_no_setting_of_its_host() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr

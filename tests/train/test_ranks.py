"""Collectives, bank and steps on 2 and 4 ranks against 1: the same losses, gradients and references to 1e-5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.plain_training import ACCUMULATED, CLOSE, VARIANTS, assert_gradients_close

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def found(tiny_set, tmp_path_factory):
    """Results by world size. In processes of their own: the ranks are forked, which a process with Ray must not be."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    root = SUPPORT.parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, str(SUPPORT / "ranks.py"), str(tiny_set), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("world", [2, 4])
def test_gather_with_gradient(found, world):
    for name, value in found[1]["gather"].items():
        torch.testing.assert_close(found[world]["gather"][name], value, **CLOSE)


@pytest.mark.parametrize("world", [2, 4])
def test_running_statistics_are_averaged(found, world):
    ranks = found[world]["statistics"]
    assert not torch.allclose(ranks["all"][0], ranks["all"][1]), "each saw other samples"
    torch.testing.assert_close(ranks["mean"], ranks["all"].mean(0).expand(world, -1), **CLOSE)
    torch.testing.assert_close(ranks["frozen"], ranks["all"], atol=0, rtol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_scores_of_an_evaluation_in_training_are_the_same_to_the_last_bit(found, world):
    one = found[1]["scores"]
    assert 0 < one["mAP"] <= one["refined_mAP"] and len(set(one["refine_gain"]["weight"].values())) > 2
    assert found[world]["scores"] == one


@pytest.mark.parametrize("world", [2, 4])
def test_the_ledger_is_that_of_one_rank(found, world):
    named, seen, audit = found[1]["ledger"]
    assert named[3] == named[7] == 3 and seen[3]["replaced"] == {3: 3, 7: 3}
    assert (audit["lost"], audit["repeated"], audit["replaced"], audit["other"]) == (2, 0, 6, 0)
    assert found[world]["ledger"] == [named, seen, audit]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("update", ["moving_average", "gradient"])
@pytest.mark.parametrize("per_object", [1, 2])
def test_bank(found, world, update, per_object):
    """10 objects on 4 ranks: shares of 3, 3, 3 and 1."""
    one, many = (found[w][f"bank {update} {per_object}"] for w in (1, world))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, **CLOSE)
    assert not torch.equal(one["initial"], one["final"])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("variant, accumulation", [*((v, 1) for v in VARIANTS), *((v, 2) for v in ACCUMULATED)])
def test_steps(found, world, variant, accumulation):
    one, many = found[1][f"{variant} / 1"], found[world][f"{variant} / {accumulation}"]
    torch.testing.assert_close(many["losses"], one["losses"], **CLOSE)
    for a, b in zip(many["references"], one["references"], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(many["gradients"], one["gradients"], strict=True):
        assert_gradients_close(a, b)

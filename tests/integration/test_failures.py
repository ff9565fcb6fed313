"""Faults on a cluster of several nodes: the run goes on, or stops by name, and no sample is lost or repeated.

The scenarios are those of `make chaos`, one cluster for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.scenarios import SCENARIOS, Chaos, Outcome, chaos_on

# several starts of a training each; a busy machine takes minutes for one. tests/integration/test_jobs.py has the commonest faults
# on one node in the fast suite
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def chaos(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with chaos_on(tiny_set, tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_fault(chaos: Chaos, scenario: Callable[[Chaos], Outcome]) -> None:
    outcome = scenario(chaos)
    assert outcome.passed, outcome
    assert (outcome.samples_lost, outcome.samples_repeated) == (0, 0)

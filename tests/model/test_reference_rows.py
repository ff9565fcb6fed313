"""Arithmetic of references on the rows of one rank, against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.model.reference_rows import assign_features, initial_rows, moving_average


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=4), st.integers(0, 3))
def test_initial_rows_do_not_depend_on_how_they_are_shared(cuts, seed):
    whole = initial_rows(0, 9000, 2, 3, seed)
    edges = [0, *sorted(cuts), 9000]
    parts = [initial_rows(a, b - a, 2, 3, seed) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_initial_rows_are_different_unit_vectors():
    rows = initial_rows(0, 5000, 2, 16, 0).view(-1, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(10000))
    assert len(rows.unique(dim=0)) == 10000
    assert not torch.equal(initial_rows(0, 10, 2, 16, 1), initial_rows(0, 10, 2, 16, 0))
    # a set that grows keeps the rows of its first objects
    assert torch.equal(initial_rows(0, 4097, 2, 16, 0), initial_rows(0, 5000, 2, 16, 0)[:4097])


@pytest.mark.parametrize("momentum", [0.0, 0.8, 1.0])
def test_moving_average_equals_the_loop(momentum):
    g = torch.Generator().manual_seed(0)
    rows, sums = torch.randn(5, 3, 4, generator=g), torch.randn(5, 3, 4, generator=g)
    counts = torch.tensor([[0.0, 1, 2], [3, 0, 0], [1, 1, 1], [0, 0, 0], [4, 0, 5]])
    rows[0, 1] = rows[1, 1] = rows[3] = 0  # never seen: one visited now, the others not
    expected = rows.clone()
    for i in range(5):
        for k in range(3):
            if counts[i, k] == 0:
                continue
            mean = sums[i, k] / counts[i, k]
            seen = any(x != 0 for x in rows[i, k].tolist())
            expected[i, k] = momentum * rows[i, k] + (1 - momentum) * mean if seen else mean
    torch.testing.assert_close(moving_average(rows, sums, counts, momentum), expected)


def literal_slot(feature, is_text, references, assign):
    """Best slot for one feature: an unseen reference before any other, the first of several; else the best cosine."""
    allowed = [k for k in range(len(references)) if assign == "nearest" or k % 2 == int(is_text)]
    for k in allowed:
        if references[k].abs().max() == 0:
            return k
    cosines = [torch.nn.functional.cosine_similarity(feature, references[k], dim=0).item() for k in allowed]
    return allowed[cosines.index(max(cosines))]


@pytest.mark.parametrize("assign, per_object", [("nearest", 1), ("nearest", 3), ("modality", 2), ("modality", 4)])
def test_assignment_equals_the_loop(assign, per_object):
    g = torch.Generator().manual_seed(per_object)
    features, references = torch.randn(60, 5, generator=g), torch.randn(60, per_object, 5, generator=g)
    references[torch.rand(60, per_object, generator=g) < 0.2] = 0
    is_text = torch.arange(60) >= 30
    slots = assign_features(features, is_text, references, assign)
    assert slots.tolist() == [literal_slot(*x, assign) for x in zip(features, is_text.tolist(), references)]
    if per_object > 1:
        assert len(set(slots.tolist())) == per_object, "every slot is used"
    if assign == "modality":
        assert ((slots % 2).bool() == is_text).all()

"""The choice of the refinement on val: one score for each pair of words and object counts as often as it occurs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mmref.config import Config
from mmref.evaluate.choose import choose_on_val, config_grid, trained_space
from mmref.evaluate.features import Queries
from mmref.evaluate.refinement import choose_refinement, refinement_grid


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    # dense codes are centred by the mean of what is scored, which repeats would move
    grid = {"kinds": ["sparse"], "weights": [0.3, 1.0], "top_rs": [4], "taus": [0.1]}
    return make_config({f"eval.refine_{name}": values for name, values in grid.items()})


def test_equal_captions_are_scored_once_and_counted_each(config: Config) -> None:
    rng = np.random.default_rng(0)
    text, image, objects = unit(rng, 6, 8), unit(rng, 30, 8), np.arange(30) % 5
    at = rng.integers(0, 6, 80)  # 80 captions of 6 distinct texts, some of which belong to several objects
    rows = rng.integers(0, 5, 80)
    queries = Queries([f"text {i}" for i in range(6)], at, np.array([""] * 80), rows, np.zeros(80, np.int64))
    space = trained_space(config, unit(rng, 12, 2, 8))
    best, tried = choose_on_val(config, space, text, queries, image, objects)
    grid = refinement_grid(["sparse"], weights=(0.3, 1.0), top_rs=(4,), taus=(0.1,), top_ps=(config.eval.top_p,))
    assert space is not None
    expected, table = choose_refinement(space, text[at], image, rows, objects, grid, config.eval.metric)
    assert best == expected and len(tried) == 3
    for row, other in zip(tried, table):
        assert row == pytest.approx(other)


def test_a_small_val_keeps_the_cap_that_larger_galleries_need(make_config: Callable[..., Config]) -> None:
    assert {s.top_p for s in config_grid(make_config({"eval.top_p": 1000}))} == {1000}
    assert {s.top_p for s in config_grid(make_config({"eval.top_p": 0}))} == {None}


def test_references_of_caption_weights_alone_take_part(make_config: Callable[..., Config]) -> None:
    """Training keeps them, so the space that results are refined in is theirs."""
    config = make_config({"loss.w_guide": 0.0, "loss.w_fuse": 0.0, "loss.caption_weight": 5.0})
    assert trained_space(config, np.ones((3, 1, 4), np.float32)) is not None


def test_only_trained_references_take_part(make_config: Callable[..., Config]) -> None:
    references = unit(np.random.default_rng(1), 5, 2, 8)
    references[3] = 0  # an object that no step has visited
    space = trained_space(make_config(), references)
    assert space is not None and space.n_objects == 4
    assert trained_space(make_config(), np.zeros((5, 1, 8), np.float32)) is None
    align_only = make_config({"loss.w_guide": 0.0, "loss.w_fuse": 0.0})
    assert trained_space(align_only, references) is None
    best, tried = choose_on_val(align_only, None, *[None] * 4)  # type: ignore[arg-type]
    assert best.weight == 0 and tried == []

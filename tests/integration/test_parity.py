"""The same losses, gradients and references on any number of workers, at any ZeRO stage, however a step is accumulated."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import STEPS, run, tiny, wide
from support.plain_training import AT

from mmref.losses.objective import TOTAL

CLOSE = 1e-5
# one of each kind in the fast suite; every combination in the slow one
SOME = [(1, 0, 4), (2, 1, 2), (4, 2, 1), (2, 3, 2)]
EVERY = [c for c in product((1, 2, 4), (0, 1, 2, 3), (1, 2, 4)) if c != (1, 0, 1) and c not in SOME]


@pytest.fixture(scope="module")
def alone(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, nothing sharded, the whole batch at once."""
    return run(tmp_path_factory.mktemp("alone"), tiny(tiny_set), 1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry (at least 1)."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1))


def relative_to_largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert len(found["losses"]) == STEPS
    assert relative(torch.tensor(expected["losses"]), torch.tensor(found["losses"])) < CLOSE
    assert relative(torch.tensor(expected["norms"]), torch.tensor(found["norms"])) < CLOSE
    for step in ("first", "last"):
        assert set(found[step]) == set(expected[step]), "a parameter lost its gradient"
        for name, gradient in expected[step].items():
            assert relative(gradient, found[step][name]) < CLOSE, (step, name)
    for name, weight in expected["weights"].items():
        assert relative(weight, found["weights"][name]) < CLOSE, name
    assert relative(expected["rows"], found["rows"]) < CLOSE


def same(tmp_path: Path, tiny_set: Path, alone: dict[str, Any], workers: int, stage: int, accumulation: int) -> None:
    values = tiny(tiny_set, train__workers=workers, train__zero_stage=stage, train__accumulation=accumulation)
    compare(alone, run(tmp_path, values, workers))


@pytest.mark.parametrize(("workers", "stage", "accumulation"), SOME)
def test_some(tmp_path: Path, tiny_set: Path, alone: dict[str, Any], workers: int, stage: int, accumulation: int) -> None:
    same(tmp_path, tiny_set, alone, workers, stage, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage", "accumulation"), EVERY)
def test_every(tmp_path: Path, tiny_set: Path, alone: dict[str, Any], workers: int, stage: int, accumulation: int) -> None:
    same(tmp_path, tiny_set, alone, workers, stage, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage", "accumulation"), [(1, 0, 1), (2, 1, 2), (2, 2, 1)])
def test_compiled_towers(
    tmp_path: Path, tiny_set: Path, alone: dict[str, Any], workers: int, stage: int, accumulation: int
) -> None:
    """torch.compile inside the engine: same names, same run."""
    scale = {"train__workers": workers, "train__zero_stage": stage, "train__accumulation": accumulation}
    found = run(tmp_path, tiny(tiny_set, train__compile=True, **scale), workers)
    assert found["compiled"] and not alone["compiled"]
    compare(alone, found)


def test_losses_fall_and_all_parts_are_there(alone: dict[str, Any]) -> None:
    losses = torch.tensor(alone["losses"])  # (steps, losses)
    assert losses[-1, AT["loss_rec"]] < losses[0, AT["loss_rec"]], "masked words are not learned"
    assert all(losses[-1, AT[name]] > 0 for name in (TOTAL, "loss_align", "loss_rec", "loss_guide")), "a loss is missing"
    assert (losses[:, AT["loss_fuse"]] == 0).all(), "references that follow are not fused by a loss"
    assert alone["rows"].abs().sum() > 0, "no reference followed its object"


def test_gradient_references(tmp_path: Path, tiny_set: Path) -> None:
    """The same under gradient fusion with sampled negatives and two references per object."""
    kind = {
        "reference__update": "gradient",
        "reference__negatives": "sampled",
        "reference__sampled_negatives": 4,
        "reference__per_object": 2,
        "reference__score": "lme",
    }
    expected = run(tmp_path / "1", tiny(tiny_set, **kind), 1)
    assert all(line[AT["loss_fuse"]] > 0 for line in expected["losses"]), "references are fused by a loss"
    values = tiny(tiny_set, train__workers=2, train__accumulation=2, **kind)
    compare(expected, run(tmp_path / "2", values, 2))


@pytest.fixture(scope="module")
def wide_alone(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, nothing sharded, of towers that are large enough to be partitioned."""
    return run(tmp_path_factory.mktemp("wide"), wide(tiny_set, train__zero_stage=0), 1)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_sent_in_bf16(tmp_path: Path, tiny_set: Path, alone: dict[str, Any], stage: int) -> None:
    """A gradient is off by what bf16 rounds away of each worker's part and of their sum, 2 ** -8 of the largest entry at most
    for each; losses stay closer. Attention does not see the biases of its keys: their gradient is rounding alone."""
    found = run(tmp_path, tiny(tiny_set, train__workers=2, train__zero_stage=stage, train__gradient_dtype="bf16"), 2)
    seen = {name: gradient for name, gradient in alone["first"].items() if not name.endswith(("k_proj.bias", "key.bias"))}
    off = [relative_to_largest(gradient, found["first"][name]) for name, gradient in seen.items()]
    assert 1e-4 < max(off) < 2 * 2**-8, "sent in bf16, and no more than rounded"
    assert relative(torch.tensor(alone["losses"]), torch.tensor(found["losses"])) < 1e-3


PARTITIONED = {"train__workers": 2, "train__accumulation": 2, "train__zero_stage": 3}


def check_goes_on(alone: dict[str, Any], found: dict[str, Any]) -> None:
    """A run that went on from step 6 is the one that was never interrupted."""
    assert relative(torch.tensor(alone["losses"][6:]), torch.tensor(found["losses"])) < CLOSE
    for name, weight in alone["weights"].items():
        assert relative(weight, found["weights"][name]) < CLOSE, name
    assert relative(alone["rows"], found["rows"]) < CLOSE


def check_partitioned(found: dict[str, Any]) -> None:
    """The tiny towers lie below DeepSpeed's threshold: stage 3 keeps every parameter of theirs whole."""
    names = [name for name in found["partitioned"] if found["weights"][name].numel() > 10_000]
    for part in ("backbone.vision_model.", "backbone.text_model.", "reconstruct."):
        assert any(name.startswith(part) for name in names), (part, names)
    assert len(names) == len(found["partitioned"])


def test_parameters_that_are_partitioned(tmp_path: Path, tiny_set: Path, wide_alone: dict[str, Any]) -> None:
    assert not wide_alone["partitioned"]
    compare(wide_alone, run(tmp_path / "1", wide(tiny_set, train__zero_stage=1), 1))
    found = run(tmp_path / "2", wide(tiny_set, **PARTITIONED), 2)
    check_partitioned(found)
    compare(wide_alone, found)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [(1, 0), (2, 3)])
def test_a_checkpoint_of_parameters_that_are_partitioned(
    tmp_path: Path, tiny_set: Path, wide_alone: dict[str, Any], loader: tuple[int, int]
) -> None:
    """Written from partitions, and read back into whole parameters or partitions."""
    workers, stage = loader
    check_partitioned(run(tmp_path / "a", wide(tiny_set, **PARTITIONED), 2, stop_at=6))
    values = wide(tiny_set, train__workers=workers, train__zero_stage=stage)
    found = run(tmp_path / "b", values, workers, resume=str(tmp_path / "a" / "checkpoint"))
    check_goes_on(wide_alone, found)


def test_irra_s_objective(tmp_path: Path, tiny_set: Path) -> None:
    """The classifier over objects is a plain parameter: sharded, accumulated and saved by name as every other."""
    irra = {  # a sharper SDM has gradients of 80 from random weights, whose parts cancel out to what rounding leaves
        "loss__align": "sdm", "loss__tau": 1.0, "loss__w_guide": 0.0, "loss__w_fuse": 0.0, "loss__w_rec": 0.0, "loss__w_id": 1.0,
        "loss__w_mlm": 1.0, "loss__mlm_layers": 1,
    }  # fmt: skip
    expected = run(tmp_path / "1", tiny(tiny_set, **irra), 1)
    found = run(tmp_path / "2", tiny(tiny_set, train__workers=2, train__accumulation=2, train__zero_stage=3, **irra), 2)
    compare(expected, found)
    assert found["weights"]["classify.weight"].shape == (14, 32)
    losses = torch.tensor(found["losses"])
    for name in ("loss_id", "loss_mlm"):
        assert losses[-1, AT[name]] < losses[0, AT[name]], f"{name} does not fall: it is not learned"


@pytest.mark.slow
def test_sigmoid_loss(tmp_path: Path, tiny_set: Path) -> None:
    """Temperature and bias are parameters of one number each, which the engine keeps as it keeps the others."""
    pairs = {"loss__align": "sigmoid", "loss__learn_tau": True, "loss__bias": -3.0, "loss__w_rec": 0.0}
    expected = run(tmp_path / "1", tiny(tiny_set, **pairs), 1)
    found = run(tmp_path / "2", tiny(tiny_set, train__workers=2, train__accumulation=2, train__zero_stage=3, **pairs), 2)
    compare(expected, found)
    assert {"logit_bias", "log_scale"} <= set(expected["first"]) and expected["weights"]["logit_bias"].item() != -3


# A large temperature: the towers begin at random, and a sharp maximum would have one negative or another by what is rounded.
RDE = {
    "loss__align": "rde", "loss__rde_tau": 0.2, "loss__rde_margin": 0.3, "loss__rde_from": 0.2, "loss__w_rec": 0.0,
    "data__caption_noise": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def divided(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """RDE in one process: InfoNCE for two steps, then pairs are divided at each epoch of two."""
    return run(tmp_path_factory.mktemp("divided"), tiny(tiny_set, train__zero_stage=0, **RDE), 1)


def compare_pairs(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Losses that are kept and labels; those of a loss at the hinge, whose step has hardly any spread, as well."""
    assert torch.equal(expected["pairs"]["labels"], found["pairs"]["labels"])
    torch.testing.assert_close(found["pairs"]["losses"], expected["pairs"]["losses"], atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("workers", "stage", "accumulation"),
    [(2, 3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 2, 1), (1, 1, 4), (2, 0, 1)))],
)
def test_division_of_pairs(
    tmp_path: Path, tiny_set: Path, divided: dict[str, Any], workers: int, stage: int, accumulation: int
) -> None:
    scale = {"train__workers": workers, "train__zero_stage": stage, "train__accumulation": accumulation}
    found = run(tmp_path, tiny(tiny_set, **scale, **RDE), workers)
    compare(divided, found)
    compare_pairs(divided, found)
    assert 0 < int((found["pairs"]["labels"] == 0).sum()) < len(found["pairs"]["labels"]), "some are taken for wrong"


@pytest.mark.parametrize("stop", [pytest.param(6, marks=pytest.mark.slow), 7])
def test_division_of_pairs_goes_on_elsewhere(tmp_path: Path, tiny_set: Path, divided: dict[str, Any], stop: int) -> None:
    """Stopped before a step that divides, and in the middle of an epoch, whose labels are not those of its losses."""
    run(tmp_path / "a", tiny(tiny_set, train__workers=2, train__zero_stage=2, **RDE), 2, stop_at=stop)
    found = run(tmp_path / "b", tiny(tiny_set, **RDE), 1, resume=str(tmp_path / "a" / "checkpoint"))
    assert relative(torch.tensor(divided["losses"][stop:]), torch.tensor(found["losses"])) < CLOSE
    for name, weight in divided["weights"].items():
        assert relative(weight, found["weights"][name]) < CLOSE, name
    compare_pairs(divided, found)


@pytest.mark.slow
def test_locked_layers_and_rates_by_depth(tmp_path: Path, tiny_set: Path) -> None:
    """More groups of the optimizer, and a tower whose first layers have no gradient."""

    def tuned(**scale: int) -> dict[str, Any]:
        values = tiny(tiny_set, train__lock_image=1, train__layer_decay=0.6, train__ema=0.6, loss__w_rec=0.0, **scale)
        for tower in ("vision_config", "text_config"):
            values["model"][tower]["num_hidden_layers"] = 2
        return values

    expected = run(tmp_path / "1", tuned(train__zero_stage=0), 1)
    found = run(tmp_path / "2", tuned(train__workers=2, train__accumulation=2, train__zero_stage=3), 2)
    compare_averages(expected, found)
    assert not [n for n in expected["first"] if "vision_model.embeddings" in n] and expected["first"]


@pytest.mark.slow
def test_adapters_by_lora(tmp_path: Path, tiny_set: Path) -> None:
    """Of wide towers, whose frozen weights ZeRO-3 partitions. A checkpoint has the adapters alone; another stage goes on."""
    pytest.importorskip("peft")
    lora = {"model__lora_image": 4, "model__lora_text": 4, "train__ema": 0.6, "loss__w_rec": 0.0}
    expected = run(tmp_path / "1", wide(tiny_set, train__zero_stage=0, **lora), 1)
    found = run(tmp_path / "2", wide(tiny_set, **PARTITIONED, **lora), 2)
    compare_averages(expected, found)
    assert [n for n in found["partitioned"] if "base_layer" in n] and [n for n in expected["first"] if "lora_B" in n]
    run(tmp_path / "3", wide(tiny_set, **PARTITIONED, **lora), 2, stop_at=6)
    resumed = run(tmp_path / "4", wide(tiny_set, train__zero_stage=1, **lora), 1, resume=str(tmp_path / "3" / "checkpoint"))
    check_goes_on(expected, resumed)


EMA = {"train__ema": 0.6, "loss__align": "sigmoid", "loss__bias": -3.0, "loss__learn_tau": True}


@pytest.fixture(scope="module")
def averaging(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("averaging"), tiny(tiny_set, train__zero_stage=0, **EMA), 1)


def compare_averages(expected: dict[str, Any], found: dict[str, Any]) -> None:
    compare(expected, found)
    for name, state in expected["states"].items():
        assert state.keys() == found["states"][name].keys(), name
        if "ema" in state:  # not of what is frozen
            assert relative(state["ema"], found["states"][name]["ema"]) < CLOSE, name
    for a, b in zip(expected["features"], found["features"]):
        assert relative(a, b) < CLOSE
    assert not torch.allclose(*found["features"], atol=1e-4), "the average is not what is trained"


@pytest.mark.parametrize(
    ("workers", "stage", "accumulation"),
    [(2, 3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1, 1), (4, 2, 1), (2, 0, 2)))],
)
def test_averages_of_weights(
    tmp_path: Path, tiny_set: Path, averaging: dict[str, Any], workers: int, stage: int, accumulation: int
) -> None:
    scale = {"train__workers": workers, "train__zero_stage": stage, "train__accumulation": accumulation}
    compare_averages(averaging, run(tmp_path, tiny(tiny_set, **scale, **EMA), workers))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(2, 3), (2, 1), (1, 0)])
def test_averages_go_on_bit_by_bit(tmp_path: Path, tiny_set: Path, workers: int, stage: int) -> None:
    """Temperature and bias, of one number, are on one of two workers."""
    values = tiny(tiny_set, train__workers=workers, train__zero_stage=stage, **EMA)
    whole = run(tmp_path / "whole", values, workers)
    run(tmp_path / "a", values, workers, stop_at=6)
    found = run(tmp_path / "b", values, workers, resume=str(tmp_path / "a" / "checkpoint"))
    for name, state in whole["states"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, found["states"][name][key]), (name, key)
    assert all(torch.equal(a, b) for a, b in zip(whole["features"], found["features"]))


@pytest.mark.slow
def test_averages_go_on_elsewhere(tmp_path: Path, tiny_set: Path, averaging: dict[str, Any]) -> None:
    run(tmp_path / "a", tiny(tiny_set, train__workers=2, train__zero_stage=3, **EMA), 2, stop_at=6)
    values = tiny(tiny_set, train__workers=2, train__zero_stage=2, **EMA)
    found = run(tmp_path / "b", values, 2, resume=str(tmp_path / "a" / "checkpoint"))
    check_goes_on(averaging, found)
    for name, state in averaging["states"].items():
        assert relative(state["ema"], found["states"][name]["ema"]) < CLOSE, name


def test_kept_tokens_of_frozen_towers(tmp_path: Path, tiny_set: Path) -> None:
    """Two sharded workers that fill and read the same files learn what one does."""

    def frozen(name: str, **scale: int) -> dict[str, Any]:
        kept = {
            "model__freeze_backbone": True,
            "model__adapter_layers": 1,
            "model__feature_cache": str(tmp_path / name),
        }
        values = tiny(tiny_set, **kept, data__crop_padding=0, data__erase=0.0, **scale)
        values["model"]["text_config"]["vocab_size"] = 4001  # an odd number of parameters, which buckets must not have
        return values

    expected = run(tmp_path / "1", frozen("a"), 1)
    found = run(tmp_path / "2", frozen("b", train__workers=2, train__accumulation=2, train__zero_stage=2), 2)
    assert len(list((tmp_path / "b").glob("*.sqlite"))) == 2, "a file a tower"
    compare(expected, found)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ((2, 1), (1, 3)),
        pytest.param((1, 3), (2, 2), marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 0), marks=pytest.mark.slow),
    ],
)
def test_checkpoint_continues_on_other_workers_and_stages(
    tmp_path: Path, tiny_set: Path, alone: dict[str, Any], saver: tuple[int, int], loader: tuple[int, int]
) -> None:
    """Six steps on some workers, the other four on others: the run that was never interrupted."""
    (w1, z1), (w2, z2) = saver, loader
    run(tmp_path / "a", tiny(tiny_set, train__workers=w1, train__zero_stage=z1), w1, stop_at=6)
    values = tiny(tiny_set, train__workers=w2, train__zero_stage=z2)
    found = run(tmp_path / "b", values, w2, resume=str(tmp_path / "a" / "checkpoint"))
    check_goes_on(alone, found)

"""What a run will need: counts of the model, arithmetic of what is shared out and sent, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmref.cli import main
from mmref.config import from_dict
from mmref.config.inputs import settled
from mmref.model.mmref import build_model
from mmref.sizing import command
from mmref.sizing.estimate import ModelSize, compute_sizing, measure_model, scaled

ROOT = Path(__file__).parents[2]
SMALL = ModelSize(parameters=1_000, trained=1_000, embed_dim=8, activations=500, features_flops=10, flops=30)


def test_the_model_is_counted_as_it_is(make_config):
    config = make_config({"loss.w_rec": 0.3})
    real = build_model(config, 0)
    found = measure_model(config, 4)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.trained == found.parameters - 1  # the temperature is not learned
    assert found.embed_dim == real.embed_dim
    plain = measure_model(make_config(), 4)
    assert 2.5 < plain.flops / plain.features_flops < 3.1
    assert found.features_flops == plain.features_flops, "heads do not count"


def test_flops_and_activations_grow_with_the_batch_and_with_reconstruction(make_config):
    one, two = (measure_model(make_config(), n) for n in (4, 8))
    assert two.flops == 2 * one.flops
    assert 1.8 < two.activations / one.activations <= 2
    with_words = measure_model(make_config({"loss.w_rec": 0.3}), 4)
    assert with_words.flops > 1.2 * one.flops and with_words.activations > one.activations


def test_the_heads_of_irra_are_counted(make_config):
    config = make_config({"loss.w_id": 1.0, "loss.w_mlm": 1.0})
    one, more = measure_model(make_config(), 4), measure_model(config, 4, 1000)
    assert more.parameters == sum(p.numel() for p in build_model(config, 0, 1000).parameters())
    assert more.flops > one.flops + 3 * 2 * 4 * 2 * 1000 * one.embed_dim and more.activations > one.activations


def test_recomputed_activations_are_smaller_and_cost_a_forward(make_config):
    towers = {"model.vision_config": {**make_config().model.vision_config, "num_hidden_layers": 6}}
    plain = measure_model(make_config(towers), 8)
    again = measure_model(make_config({**towers, "train.gradient_checkpointing": True}), 8)
    assert again.activations < 0.6 * plain.activations
    assert plain.flops < again.flops < plain.flops + plain.features_flops


def test_an_average_is_held_and_saved_as_a_moment_is(make_config):
    for stage, more in ((0, 4000), (1, 1000)):
        scale = {"train__workers": 4, "train__zero_stage": stage}
        without, average = size(make_config, **scale), size(make_config, **scale, train__ema=0.99)
        assert average.optimizer - without.optimizer == more and average.checkpoint - without.checkpoint == 4000


def test_what_is_locked_is_not_trained(make_config):
    plain, locked = measure_model(make_config(), 4), measure_model(make_config({"train.lock_image": 1}), 4)
    assert locked.parameters == plain.parameters and locked.trained < plain.trained and locked.flops < plain.flops


def size(make_config, objects=1000, **overrides):
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    return compute_sizing(make_config(values), objects, SMALL)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 4000, 4000, 8000), (1, 4000, 4000, 3000), (2, 4000, 1000, 3000), (3, 5000, 1000, 3000)],
)
def test_zero_shares_out_what_its_stage_says(make_config, stage, weights, gradients, optimizer):
    """Four workers, 4,000 bytes of parameters: Adam's moments are twice that, a sharded copy of the weights once."""
    found = size(make_config, train__workers=4, train__zero_stage=stage)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_references_are_shared_out_by_rows(make_config):
    row = 2 * 8 * 4
    found = size(make_config, objects=1001, train__workers=4, reference__per_object=2)
    assert found.references == 251 * row
    adam = size(make_config, objects=1001, train__workers=4, reference__per_object=2, reference__update="gradient")
    assert adam.references == 251 * (row + row + 2 * 4 + 8)


def test_rows_in_half_the_bytes_or_on_the_host(make_config):
    plain = size(make_config, train__workers=4)
    half = size(make_config, train__workers=4, reference__row_dtype="bf16")
    host = size(make_config, train__workers=4, reference__rows_on="host")
    assert half.references == plain.references / 2 and half.send_references == plain.send_references
    assert (host.references, host.host_references) == (0, plain.references)
    assert host.device == plain.device - plain.references


def test_what_references_cost_in_a_step_does_not_grow_with_the_objects(make_config):
    def sent(negatives, objects):
        found = size(make_config, objects, train__workers=4, reference__negatives=negatives)
        return found.send_references, found.contrast

    assert sent("batch", 10_000) == sent("batch", 10_000_000)
    assert sent("sampled", 10_000) == sent("sampled", 10_000_000)
    assert sent("all", 10_000_000)[0] > 900 * sent("all", 10_000)[0]


def test_the_same_arithmetic_as_the_collectives(make_config):
    """Batch of 8 pairs, 8 numbers each, four workers: rings send 3/4 of what is gathered, twice that of what is summed."""
    found = size(make_config, train__workers=4, train__zero_stage=1)
    features = 2 * 8 * 8 * 4
    assert found.send_features == 0.75 * features + 2 * 0.75 * features
    assert found.send_gradients == 2 * 0.75 * 4000
    assert size(make_config).sent == 0, "a single worker sends nothing"
    assert size(make_config, train__workers=4, loss__w_guide=0.0, loss__w_fuse=0.0).send_references == 0
    third = size(make_config, train__workers=4, train__zero_stage=3)
    assert third.send_gradients == 0.75 * 4000 + 2 * 0.75 * 4000
    in_bf16 = size(make_config, train__workers=4, train__zero_stage=1, train__gradient_dtype="bf16")
    assert in_bf16.send_gradients == 0.75 * 2000 + 0.75 * 4000, "weights come back as they are"


def test_gradient_caching_computes_a_forward_more(make_config):
    assert size(make_config).flops == 30
    assert size(make_config, train__accumulation=2).flops == 2 * 30 + 2 * 10


def test_object_store_holds_what_readers_have_in_work(make_config):
    found = size(make_config, data__readers=2, data__steps_per_task=3)
    assert found.samples == 8 * (3 * 16 * 16 + 2 * 4 * 10 + 5 * 8)
    assert found.object_store == 5 * 3 * found.samples + 2 * found.samples


def test_the_delivered_bytes_are_those_of_a_step(make_config):
    from mmref.data.reader import StepReader

    config = make_config()
    batch = StepReader(config).read_step(0)
    arrays = sum(a.nbytes for name, a in batch.items() if name != "bad")
    assert compute_sizing(config, 1000, SMALL).samples == arrays


def test_scaled_keeps_the_share_of_a_worker(make_config):
    config = scaled(make_config(), 64, 16)
    assert config.train.workers == 64 and config.train.global_batch == 1024 and config.micro_batch == 16


def test_a_run_that_goes_on_with_fewer_workers_is_sized_at_its_own_number_or_less(capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_model", lambda *_: SMALL)
    argv = ["sizing", "--objects", "1000", "--config", "emoji", "--train.workers", "4", "--train.min_workers", "2"]
    for more, shown in (([], "4"), (["--workers", "1"], "1")):
        assert main([*argv, *more]) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["workers", shown]


@pytest.mark.parametrize("more, where, buckets", [
    ([], "GPUs", 3), (["--train.gpu", "false"], "CPUs", 2), (["--train.gpu", "true"], "GPUs", 3),
])  # fmt: skip
def test_without_a_word_on_it_a_run_is_sized_for_gpus(tmp_path, capsys, monkeypatch, more, where, buckets):
    """Whatever the machine has that is asked: the run is to train elsewhere."""
    asked = []
    monkeypatch.setattr(command, "measure_model", lambda config, *_: asked.append(config.train.precision) or SMALL)
    out = tmp_path / "sizing.json"
    argv = ["sizing", "--objects", "1000", "--config", "emoji", "--train.zero_stage", "1", "--out", str(out)]
    assert main([*argv, *more]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f" pairs a worker, on {where}")
    assert json.loads(out.read_text())[0]["buckets"] == buckets * 4 * min(SMALL.trained, 50_000_000)
    assert asked == ["bf16" if where == "GPUs" else "auto"]


CLIP_B16 = [
    "--config", str(ROOT / "configs" / "clip_vit_b16.yaml"), "--model.dual", "", "--train.zero_stage", "1",
    "--model.dual_config", "{model_type: clip, vision_config: {patch_size: 16}}", "--reference.negatives", "sampled",
]  # fmt: skip


def test_the_worked_example_of_the_docs(tmp_path, capsys):
    out = tmp_path / "sizing.json"
    argv = [
        "sizing",
        "--workers",
        "8",
        "64",
        "512",
        "--batch",
        "64",
        "--objects",
        "10000000",
        "--out",
        str(out),
        *CLIP_B16,
    ]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    table = (ROOT / "docs" / "scaling.md").read_text()
    for line in printed.splitlines()[1:]:
        assert line.strip() in table, f"docs/scaling.md has another number than: {line}"
    found = json.loads(out.read_text())
    assert [s["workers"] for s in found] == [8, 64, 512]
    assert found[0]["references"] == 10_000_000 / 8 * 512 * 4


def test_a_wrong_flag_is_the_error_of_training(capsys):
    assert main(["sizing", "--objects", "10", "--train.wokers", "2"]) == 2
    assert "train.workers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage", "accumulation"), [(1, 0, 1), (2, 1, 1), (2, 2, 2), (2, 3, 1)])
def test_the_memory_is_what_deepspeed_takes(tmp_path, tiny_set, world, stage, accumulation):
    """Peak of all tensors in two steps of a rank, against the sum of the parts."""
    from support.device_memory import run
    from support.parity import tiny

    scale = {"train__workers": world, "train__zero_stage": stage, "train__accumulation": accumulation}
    values = tiny(tiny_set, **scale, loss__w_rec=0.0)
    for tower in ("vision_config", "text_config"):
        values["model"][tower] |= {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024}
    peak, objects = run(tmp_path, values, world)
    assert compute_sizing(settled(from_dict(values)), objects).device == pytest.approx(peak, rel=0.2)


def test_measuring_does_not_change_the_random_state(make_config):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure_model(make_config(), 2)
    assert torch.equal(before, torch.get_rng_state())

"""Large batches on small memory: recomputed activations, gradient caching, bf16, compiled towers."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.plain_training import PlainTraining, train, train_adam
from support.tiny_set import BERT, CONVNEXT, VIT

from mmref.errors import ConfigError, ModelError
from mmref.sizing.live_bytes import LiveBytes

CLIP_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {
    "model_type": "clip", "projection_dim": 8,
    "vision_config": {**CLIP_TOWER, "image_size": 16, "patch_size": 8},
    "text_config": {
        **CLIP_TOWER, "vocab_size": 80, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2,
    },
}  # fmt: skip
DUAL = {"model.vision_config": None, "model.text_config": None, "model.dual_config": CLIP}
DEEP = {
    "model.vision_config": {**VIT, "num_hidden_layers": 6, "hidden_size": 32},
    "model.text_config": {**BERT, "num_hidden_layers": 6, "hidden_size": 32},
    "train.global_batch": 24,
}
DROPOUT = {
    "model.vision_config": {**VIT, "hidden_dropout_prob": 0.3},
    "model.text_config": {**BERT, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def compare(plain, other, atol):
    """Losses, gradients and references of every step."""
    torch.testing.assert_close(other.losses, plain.losses, atol=atol, rtol=atol)
    for a, b in zip(other.gradients, plain.gradients, strict=True):
        assert a.keys() == b.keys(), "a parameter lost its gradient"
        for name in b:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(other.references, plain.references, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# -- recomputed activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [{"loss.w_rec": 0.3}, {"loss.w_rec": 0.3, "train.accumulation": 2}, DROPOUT | {"train.accumulation": 2}, DUAL],
    ids=["whole", "accumulated", "dropout", "clip"],
)
def test_recomputing_activations_changes_nothing(make_config, overrides):
    plain = train(make_config(overrides), steps=2)
    compare(plain, train(make_config({**overrides, "train.gradient_checkpointing": True}), steps=2), atol=1e-6)


def peak_bytes(config) -> int:
    """Tensors alive at once in a step, beyond parameters and the batch."""
    run = PlainTraining(config)
    batch = run.reader.read_step(0)
    with LiveBytes() as memory:
        run.runner.run(0, run.runner.prepare(0, batch))
    return memory.peak


def test_recomputing_and_accumulating_save_memory(make_config):
    def peak(checkpointing, accumulation):
        saving = {"train.gradient_checkpointing": checkpointing, "train.accumulation": accumulation}
        return peak_bytes(make_config({**DEEP, **saving}))

    whole = peak(False, 1)
    assert peak(True, 1) < 0.5 * whole
    assert peak(False, 4) < 0.5 * whole
    assert peak(True, 4) < 0.3 * whole


def test_a_tower_that_cannot_recompute_is_a_named_error(make_config):
    with pytest.raises(ModelError, match=r"ConvNextModel.*train\.accumulation"):
        PlainTraining(make_config({"model.vision_config": CONVNEXT, "train.gradient_checkpointing": True}))


# -- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bf16_trains_as_fp32_does(make_config, accumulation):
    """Forty steps of both: the loss falls as far, and every weight that has a gradient keeps one."""
    overrides = {"train.max_steps": 40, "train.lr": 3e-3, "train.accumulation": accumulation, "loss.w_rec": 0.2}
    runs = {
        precision: torch.tensor(train_adam(make_config({**overrides, "train.precision": precision}), 40))[:, 0]
        for precision in ("fp32", "bf16")
    }
    first, last = runs["bf16"][:5].mean(), runs["bf16"][-5:].mean()
    assert torch.isfinite(runs["bf16"]).all() and not torch.equal(runs["bf16"], runs["fp32"])
    assert last < 0.9 * first
    assert abs(last - runs["fp32"][-5:].mean()) < 0.1 * first


# -- compiled towers -------------------------------------------------------------------------------------------------


def compiled(config) -> PlainTraining:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run = PlainTraining(config)
    run.model.compile_towers()
    return run


def check_compiled(make_config, overrides):
    plain, fast = PlainTraining(make_config(overrides)), compiled(make_config(overrides))
    for step in range(2):
        torch.testing.assert_close(fast.step(step), plain.step(step), atol=1e-5, rtol=1e-5)
        a, b = fast.gradients(), plain.gradients()
        assert list(a) == list(b), "compiling renamed a parameter"
        for name in b:
            torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    return fast


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        DROPOUT | {"train.accumulation": 2, "loss.w_rec": 0.3},
        {"model.vision_config": CONVNEXT},
        {"train.gradient_checkpointing": True},
        {"train.precision": "bf16"},
        DUAL,
    ],
    ids=["dropout, accumulated", "convnext", "recomputed", "bf16", "clip"],
)
def test_compiled_towers_train_alike(make_config, overrides):
    fast = check_compiled(make_config, overrides)
    state = fast.model.state_dict()
    assert not [name for name in state if "_orig_mod" in name]
    assert list(state) == list(PlainTraining(make_config(overrides)).model.state_dict())


@pytest.mark.slow
def test_evaluation_runs_the_towers_as_they_are(make_config):
    """Its batches have other shapes, each of which would be compiled anew."""
    fast = compiled(make_config())
    fast.step(0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fast.model.eval()
    with torch.no_grad():
        for n in (3, 5):
            fast.model(torch.zeros(n, 3, 16, 16))
    fast.model.train()
    fast.step(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_compiling_where_nothing_is_left_to_compile_is_a_named_error(make_config):
    with pytest.raises(ConfigError, match=r"train\.compile.*stages 0 to 2"):
        make_config({"train.compile": True, "train.zero_stage": 3})


def test_compiling_is_asked_for_by_the_config_and_keeps_names(make_config):
    model = PlainTraining(make_config()).model
    names = [n for n, _ in model.named_parameters()]
    assert model.backbone.vision_model._compiled_call_impl is None
    model.compile_towers()
    assert model.backbone.vision_model._compiled_call_impl is not None
    assert [n for n, _ in model.named_parameters()] == names

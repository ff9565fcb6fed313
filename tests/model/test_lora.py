"""LoRA on towers: what learns, what a checkpoint holds, and an export that is the same model without peft."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.plain_training import PlainTraining
from support.tiny_run import make_run
from transformers import AutoModel

import mmref
from mmref.data.tokens import load_tokens
from mmref.errors import ConfigError, ExtraMissingError
from mmref.export.write import export_run
from mmref.model.lora import below_adapters
from mmref.model.mmref import build_model
from mmref.run.checkpoints import load_model
from mmref.run.directory import RunDir
from mmref.sizing.estimate import compute_sizing, measure_model
from mmref.train import checkpoint_files

LORA = {"model.lora_image": 2, "model.lora_text": 3, "model.lora_alpha": 6.0}


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_without_the_package_the_error_names_the_extra(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExtraMissingError, match=r"`model.lora_text` needs the extra `lora`.*mmref\[lora\]"):
        build_model(make_config({"model.lora_text": 2}), 80)


@pytest.mark.parametrize("overrides, said", [
    ({"model.freeze_backbone": True}, "model.lora_image"), ({"train.lock_text": "all"}, "`model.lora_text` trains adapters"),
    ({"train.start_from": "runs/a"}, r"`train.start_from` would give it other weights"),
])  # fmt: skip
def test_what_does_not_go_together(make_config, overrides, said):
    with pytest.raises(ConfigError, match=said):
        make_config({**LORA, **overrides})


@pytest.fixture
def adapted(make_config):
    pytest.importorskip("peft")
    return make_config(LORA)


def test_adapters_alone_are_trained_and_begin_as_nothing(adapted, make_config):
    run, plain = PlainTraining(adapted), PlainTraining(make_config())
    torch.testing.assert_close(run.step(0), plain.step(0), atol=0, rtol=0)
    towers = {n for n, p in run.model.named_parameters() if p.requires_grad and "_model." in n}
    assert len(towers) == 2 * (6 + 6) and all("lora_" in n and run.model.is_new(n) for n in towers)
    assert run.gradients()["backbone.visual_projection.weight"].abs().max() > 0
    learned = {n for n, g in run.gradients().items() if n in towers and g.abs().max() > 0}
    assert learned == {n for n in towers if "lora_B" in n}, "A learns once B is not zero"


def test_accumulation_is_the_same_step(adapted, make_config):
    whole, cut = PlainTraining(adapted), PlainTraining(make_config({**LORA, "train.accumulation": 2}))
    torch.testing.assert_close(cut.step(0), whole.step(0), atol=1e-5, rtol=1e-5)
    for name, gradient in whole.gradients().items():
        torch.testing.assert_close(cut.gradients()[name], gradient, atol=1e-5, rtol=1e-5)


def trained(config):
    run = PlainTraining(config)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    run.engine = SimpleNamespace(module=run.model, optimizer=torch.optim.AdamW(parameters, lr=1e-2))
    return run


def steps(run, first, last):
    for step in range(first, last):
        run.step(step)
        run.engine.optimizer.step()


def test_a_checkpoint_holds_the_adapters_alone_and_goes_on(adapted, tmp_path):
    run = trained(adapted)
    steps(run, 0, 3)
    checkpoint_files.save(str(tmp_path / "c"), run.engine, run.bank, {"step": 3, "score": 0.0})
    saved = set(load_file(tmp_path / "c" / "model-0.safetensors"))
    base = below_adapters(run.model)
    assert base and not saved & base and saved == {n for n, _ in run.model.named_parameters()} - base
    plain = build_model(adapted, run.reader.tokens.vocab_size)
    load_model(str(tmp_path / "c"), plain)
    resumed = trained(adapted)
    meta = RunDir(str(tmp_path)).read_json("c/meta.json")
    checkpoint_files.load(str(tmp_path / "c"), resumed.engine, resumed.bank, meta)
    for (name, a), b, c in zip(run.model.named_parameters(), plain.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c), name
    for one in (run, resumed):
        steps(one, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), resumed.model.parameters()))


def test_a_checkpoint_is_sized_without_what_it_leaves_out(adapted, make_config):
    model, plain = build_model(adapted, 0), make_config()
    found = measure_model(adapted, 4)
    base = below_adapters(model)
    assert found.left_out == sum(p.numel() for n, p in model.named_parameters() if n in base)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < measure_model(plain, 4).trained
    assert compute_sizing(adapted, 10, found).checkpoint < compute_sizing(plain, 10, measure_model(plain, 4)).checkpoint


@pytest.mark.parametrize("overrides", [{"train.lock_image": 1}, {"train.ema": 0.5, "train.layer_decay": 0.5}], ids=str)
def test_it_goes_together_with(adapted, make_config, overrides):
    model = build_model(make_config({**LORA, **overrides}), 80)
    learns = {n for n, p in model.named_parameters() if p.requires_grad and "vision_model" in n}
    assert bool(learns) is ("train.lock_image" not in overrides), "the only layer is locked, its adapters with it"


def test_an_export_is_merged_and_has_the_adapters_beside(adapted, tmp_path, monkeypatch):
    from peft import PeftModel

    before = build_model(adapted, load_tokens(adapted).vocab_size)
    model = make_run(adapted, str(tmp_path / "run"), {})  # with weights that are not those of the start
    with torch.no_grad():  # what a checkpoint holds is the adapters: below them lies what training started from
        base = dict(before.named_parameters())
        for name in below_adapters(model):
            dict(model.named_parameters())[name].copy_(base[name])
    folder = export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not [n for n in load_file(folder / "model.safetensors") if "lora_" in n or "base_layer" in n]
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(pixels).image
        monkeypatch.setitem(sys.modules, "peft", None)  # the merged model needs no peft
        found = mmref.load(folder).module(pixels).image
        monkeypatch.undo()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        tower = AutoModel.from_config(model.backbone.vision_model.config, add_pooling_layer=False)
        own = {n.replace(".base_layer", ""): p for n, p in base.items() if n.startswith("backbone.vision_model.")}
        tower.load_state_dict({n.removeprefix("backbone.vision_model."): p for n, p in own.items() if "lora_" not in n})
        again = PeftModel.from_pretrained(tower, folder / "adapters" / "image").eval()
        a = again(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(a, model.backbone.vision_model(pixel_values=pixels).last_hidden_state, atol=1e-6, rtol=1e-5)
    assert (folder / "adapters" / "text" / "adapter_config.json").exists()

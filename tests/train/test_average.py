"""The moving average of the weights: its rule, its place in a checkpoint, and who reads it there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.plain_training import PlainTraining

from mmref.config import config_hash, dump_yaml
from mmref.errors import ConfigError
from mmref.model.mmref import build_model
from mmref.run.checkpoints import TensorFolder, load_model
from mmref.train import checkpoint_files
from mmref.train import loop as training
from mmref.train.average import FollowWeights, averaged_weights, decay_at
from mmref.train.engine import _fresh_state

EMA = {"train.ema": 0.5, "loss.learn_tau": True}


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


class Training(PlainTraining):
    """In the shape of an engine that DeepSpeed wraps nothing around."""

    def __init__(self, config, fused=None):
        super().__init__(config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
        optimizer.register_step_post_hook(FollowWeights(config.train.ema))
        for p in trained:
            optimizer.state[p] = _fresh_state(p.detach(), 0, True)
        self.engine = SimpleNamespace(module=self.model, optimizer=optimizer)

    def train(self, first, last):
        """Weights after each step."""
        seen = []
        for step in range(first, last):
            self.step(step)
            self.engine.optimizer.step()
            seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        return seen


def averages(run):
    return {n: run.engine.optimizer.state[p]["ema"] for n, p in run.model.named_parameters() if p.requires_grad}


def test_the_decay_warms_up():
    assert [decay_at(0.999, n) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_at(0.999, 10**6) == 0.999 and decay_at(0.1, 1) == 0.1


@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
def test_the_average_is_the_recurrence_written_out(make_config, fused):
    run = Training(make_config(EMA), fused)
    expected = {n: p.detach().double() for n, p in run.model.named_parameters()}
    for updates, weights in enumerate(run.train(0, 6), start=1):
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = {n: decay * e + (1 - decay) * weights[n].double() for n, e in expected.items()}
    for name, average in averages(run).items():
        torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_fused_optimizer_is_the_same(make_config):
    plain, fused = (Training(make_config(EMA), fused) for fused in (None, True))
    plain.train(0, 4), fused.train(0, 4)
    for (name, a), b in zip(plain.model.named_parameters(), fused.model.parameters()):
        if not name.endswith(("k_proj.bias", "key.bias")):  # which attention does not see: their gradient is rounding alone
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_inside_the_weights_are_the_averages_and_outside_they_are_back(make_config):
    run = Training(make_config(EMA))
    before, expected = run.train(0, 3)[-1], {n: a.clone() for n, a in averages(run).items()}
    with averaged_weights(run.engine):
        for name, p in run.model.named_parameters():
            assert torch.equal(p, expected.get(name, before[name])), name
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.equal(a, expected[n]) for n, a in averages(run).items())


def test_a_checkpoint_is_evaluated_by_the_average_and_resumed_by_both(make_config, tmp_path):
    config = make_config(EMA)
    run = Training(config)
    run.train(0, 3)
    checkpoint_files.save(str(tmp_path / "c"), run.engine, run.bank, {"step": 3, "score": 0.0})
    plain = build_model(config, run.reader.tokens.vocab_size, run.reader.index.n_objects)
    load_model(str(tmp_path / "c"), plain)
    for name, p in plain.named_parameters():
        if name in averages(run):
            assert torch.equal(p, averages(run)[name]), name
    resumed = Training(config)
    meta = checkpoint_files.RunDir(str(tmp_path)).read_json("c/meta.json")
    checkpoint_files.load(str(tmp_path / "c"), resumed.engine, resumed.bank, meta)
    run.train(3, 5)
    resumed.train(3, 5)
    for (name, a), b in zip(run.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, averages(resumed)[n]) for n, a in averages(run).items())


def test_evaluations_in_training_see_the_average(make_config):
    run, seen = Training(make_config(EMA)), []
    before = run.train(0, 3)[-1]

    class Score:
        encode_seconds = rank_seconds = 0.0

        def __call__(self, *_):
            seen.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
            return dict.fromkeys(("R@1", "R@5", "R@10", "mAP", "mINP"), 1.0)

    worker = SimpleNamespace(
        config=run.config, engine=run.engine, bank=None, encoder=None, ledger=SimpleNamespace(write=lambda done: None),
        validation=Score(), testing=Score(), _check_weights=lambda done: None, _write_bad=lambda: None,
    )  # fmt: skip
    saver = SimpleNamespace(save=lambda meta, metrics: 0.0)
    for evaluate in (True, False):
        training.Worker._evaluate_and_save(worker, 3, saver, evaluate=evaluate)
        assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters()), "training goes on with the weights"
    assert len(seen) == 2, "val and test, where it was asked for"
    for weights in seen:
        assert all(torch.equal(weights[n], average) for n, average in averages(run).items())


def test_another_run_s_start_begins_the_average(make_config, tmp_path):
    """What training starts from is what the other run was evaluated with; there is no older average."""
    run = Training(make_config(EMA))
    run.train(0, 3)
    folder = f"{tmp_path}/checkpoints/step-00000003-a"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(dump_yaml(run.config))
    checkpoint_files.save(folder, run.engine, run.bank, {"step": 3, "score": 0.0})
    fresh = Training(make_config({**EMA, "train.seed": 4}))
    checkpoint_files.start_from(checkpoint_files.RunDir(str(tmp_path)), fresh.engine, fresh.bank)
    for name, average in averages(fresh).items():
        assert torch.equal(average, averages(run)[name]) and torch.equal(average, dict(fresh.model.named_parameters())[name])


def test_off_it_leaves_no_trace(make_config, tmp_path):
    run = PlainTraining(make_config())
    optimizer = torch.optim.AdamW(run.model.parameters())
    engine = SimpleNamespace(module=run.model, optimizer=optimizer)
    checkpoint_files.save(str(tmp_path / "c"), engine, run.bank, {"step": 0, "score": 0.0})
    assert not [n for n in TensorFolder(str(tmp_path / "c"), "optimizer").files if n.endswith(("/weight", "/ema"))]
    assert config_hash(make_config()) != config_hash(make_config(EMA))
    with pytest.raises(ConfigError, match=r"`train.ema` must be below 1"):
        make_config({"train.ema": 1.0})

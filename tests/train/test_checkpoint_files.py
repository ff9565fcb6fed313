"""Checkpoint folders: complete or absent, written by any number of ranks, refused by another model."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.plain_training import PlainTraining
from support.tiny_run import make_run
from support.tiny_set import SPLITS

from mmref.config import dump_yaml
from mmref.errors import CheckpointError
from mmref.model.mmref import build_model
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files, collectives, division

OBJECTS = SPLITS["train"]
OVERRIDES = {"reference.update": "gradient", "reference.per_object": 2, "loss.w_rec": 0.3, "loss.learn_tau": True}


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


class Training(PlainTraining):
    """PlainTraining with Adam, in the shape of an engine that DeepSpeed wraps nothing around (stage 0)."""

    def __init__(self, config):
        super().__init__(config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.engine = SimpleNamespace(module=self.model, optimizer=torch.optim.AdamW(trained, lr=1e-3))

    def train(self, first, last):
        losses = []
        for step in range(first, last):
            losses.append(self.step(step))
            self.engine.optimizer.step()
        return torch.stack(losses)

    def save(self, folder, monkeypatch, world=1, **meta):
        """Write the checkpoint as so many ranks would; returns its meta.json."""
        whole = {k: v.clone() for k, v in self.bank.state_dict().items()}
        for rank in reversed(range(world)):  # rank 0 waits for the others' files
            monkeypatch.setattr(collectives, "rank", lambda r=rank: r)
            monkeypatch.setattr(collectives, "world_size", lambda: world)
            bank = type(self.bank)(self.bank.objects, self.bank.dim, self.config.reference, 0)
            bank.load_rows(bank.find(self.bank.object_ids), whole)
            checkpoint_files.save(str(folder), self.engine, bank, {"step": 2, "score": 1.0, **meta})
        monkeypatch.undo()
        return json.loads(Path(folder, "meta.json").read_text())


@pytest.fixture
def trained(make_config):
    run = Training(make_config(OVERRIDES))
    run.train(0, 2)
    return run


@pytest.mark.parametrize("world", [1, 3, 40])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(make_config, trained, tmp_path, monkeypatch, world):
    """Forty ranks are more than there are objects; the 14 rows are then on 14 of them."""
    meta = trained.save(tmp_path, monkeypatch, world)
    resumed = Training(make_config({**OVERRIDES, "train.seed": 0}))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    checkpoint_files.load(str(tmp_path), resumed.engine, resumed.bank, meta)
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), trained.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, tensor in trained.bank.state_dict().items():
        assert torch.equal(resumed.bank.state_dict()[name], tensor), name
    assert torch.equal(resumed.train(2, 5), trained.train(2, 5))


def test_every_parameter_is_written_by_one_rank_and_the_shares_are_even(trained, tmp_path, monkeypatch):
    trained.save(tmp_path, monkeypatch, world=3)
    parts = [load_file(tmp_path / f"model-{rank}.safetensors") for rank in range(3)]
    names = [n for part in parts for n in part if not n.startswith("buffer:")]
    assert sorted(names) == sorted(n for n, _ in trained.model.named_parameters())
    sizes = [sum(t.numel() for n, t in part.items() if not n.startswith("buffer:")) for part in parts]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in trained.model.parameters())
    for rank, part in enumerate(parts):
        moments = load_file(tmp_path / f"optimizer-{rank}.safetensors")
        assert {n.rsplit("/", 1)[0] for n in moments} == {n for n in part if not n.startswith("buffer:")}


def test_frozen_parameters_are_saved_without_moments(make_config, tmp_path, monkeypatch):
    run = Training(make_config({**OVERRIDES, "model.freeze_backbone": True}))
    run.train(0, 1)
    meta = run.save(tmp_path, monkeypatch)
    assert any("vision_model" in n for n in load_file(tmp_path / "model-0.safetensors"))
    assert not any("vision_model" in n for n in load_file(tmp_path / "optimizer-0.safetensors"))
    again = Training(make_config({**OVERRIDES, "model.freeze_backbone": True, "train.seed": 9}))
    checkpoint_files.load(str(tmp_path), again.engine, again.bank, meta)
    for a, b in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_and_references_alone_for_evaluation(make_config, trained, tmp_path, monkeypatch):
    meta = trained.save(tmp_path, monkeypatch, world=3)
    model = build_model(make_config({**OVERRIDES, "train.seed": 9}), trained.reader.tokens.vocab_size)
    checkpoints.load_model(str(tmp_path), model)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(pixels).image, trained.model.eval()(pixels).image)
    assert torch.equal(checkpoints.load_references(str(tmp_path), meta), trained.bank.rows)


def test_the_classifier_of_the_objects_is_left_behind_in_evaluation(make_config, tmp_path, monkeypatch):
    run = Training(make_config({**OVERRIDES, "loss.w_id": 1.0}))
    assert run.model.classify is not None
    meta = run.save(tmp_path, monkeypatch)
    model = build_model(make_config({**OVERRIDES, "loss.w_id": 1.0, "train.seed": 9}), run.reader.tokens.vocab_size)
    checkpoints.load_model(str(tmp_path), model)
    pixels = torch.randn(2, 3, 16, 16)
    assert model.classify is None and torch.equal(model.eval()(pixels).image, run.model.eval()(pixels).image)
    again = Training(make_config({**OVERRIDES, "loss.w_id": 1.0, "train.seed": 9}))
    checkpoint_files.load(str(tmp_path), again.engine, again.bank, meta)
    assert torch.equal(again.model.classify.weight, run.model.classify.weight)


def test_references_stored_in_bf16_are_read_as_fp32(make_config, tmp_path, monkeypatch):
    run = Training(make_config({"reference.row_dtype": "bf16"}))
    run.train(0, 2)
    found = checkpoints.load_references(str(tmp_path), run.save(tmp_path, monkeypatch, world=2))
    assert found.dtype == torch.float32 and torch.equal(found, run.bank.rows.float()) and found.abs().sum() > 0


@pytest.mark.parametrize("overrides, said", [
    ({"model.embed_dim": 6}, r"visual_projection.weight has shape \(8, 16\), the model needs \(6, 16\)"),
    ({"loss.w_rec": 0.0}, "unknown reconstruct"),
    ({"loss.rec_layers": 2}, "missing reconstruct.blocks.1"),
])  # fmt: skip
def test_another_model_s_checkpoint_is_refused(make_config, trained, tmp_path, monkeypatch, overrides, said):
    meta = trained.save(tmp_path, monkeypatch)
    other = Training(make_config({**OVERRIDES, **overrides}))
    before = [p.clone() for p in other.model.parameters()]
    for attempt in (
        lambda: checkpoint_files.load(str(tmp_path), other.engine, other.bank, meta),
        lambda: checkpoints.load_model(str(tmp_path), other.model),
    ):
        with pytest.raises(CheckpointError, match=rf"{tmp_path} belongs to another model.*{said}"):
            attempt()
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters())), "nothing was half-loaded"


@pytest.mark.parametrize("own, said", [
    ({"extra": 3}, "missing buffer:backbone.extra"),
    ({"scale": 3}, r"buffer:backbone.scale has shape \(1,\), the model needs \(3,\)"),
])  # fmt: skip
def test_buffers_that_differ_are_another_model_too(make_config, trained, tmp_path, monkeypatch, own, said):
    """One of a single number would be spread over the model's own without a word."""
    trained.model.backbone.register_buffer("scale", torch.zeros(1))
    folder = f"{tmp_path}/checkpoints/step-00000002-a"
    meta = trained.save(folder, monkeypatch)
    (tmp_path / "config.yaml").write_text(dump_yaml(trained.config))
    other = Training(make_config(OVERRIDES))
    for name, size in own.items():
        other.model.backbone.register_buffer(name, torch.ones(size))
    for attempt in (
        lambda: checkpoint_files.load(folder, other.engine, other.bank, meta),
        lambda: checkpoint_files.start_from(RunDir(str(tmp_path)), other.engine, other.bank),
        lambda: checkpoints.load_model(folder, other.model),
    ):
        with pytest.raises(CheckpointError, match=rf"{folder} belongs to another model \(1 differences\): {said}"):
            attempt()
    checkpoints.load_model(folder, Training(make_config(OVERRIDES)).model)  # one that the model has not is left


def test_losses_of_pairs_that_a_checkpoint_lacks_are_named(make_config, trained, tmp_path, monkeypatch):
    meta = trained.save(tmp_path, monkeypatch)
    monkeypatch.setattr(division, "LEAST", 1)
    other = Training(make_config({**OVERRIDES, "loss.learn_tau": False, "loss.align": "rde"}))
    with pytest.raises(CheckpointError, match="missing pairs/losses; missing pairs/labels"):
        checkpoint_files.load(str(tmp_path), other.engine, other.bank, meta, other.division)


def test_another_bank_s_checkpoint_is_refused(make_config, trained, tmp_path, monkeypatch):
    meta = trained.save(tmp_path, monkeypatch)
    other = Training(make_config({**OVERRIDES, "reference.per_object": 3}))
    with pytest.raises(CheckpointError, match=r"holds references .*'per_object': 2.*needs .*'per_object': 3"):
        checkpoint_files.load_bank(str(tmp_path), other.bank, meta)


@pytest.mark.parametrize("per_object", [1, 2])
def test_references_that_a_start_did_not_use_are_not_taken(make_config, tmp_path, per_object):
    """They are random, and may be of another number."""
    unused = {"loss.w_fuse": 0.0, "loss.w_guide": 0.0, "loss.w_rec": 0.0}
    make_run(make_config({"reference.update": "gradient", **unused}), str(tmp_path), {})
    other = Training(make_config({"reference.update": "gradient", "reference.per_object": per_object, "loss.w_rec": 0.0}))
    before = other.bank.rows.clone()
    checkpoint_files.start_from(RunDir(str(tmp_path)), other.engine, other.bank)
    assert torch.equal(other.bank.rows, before)


# -- which folders count ---------------------------------------------------------------------------------------------


def write(run: RunDir, step: int, tag: str = "a", world: int = 2, score: float | None = 0.0) -> str:
    """A small folder with the layout of a checkpoint; returns its name inside the run."""
    folder = f"checkpoints/step-{step:08d}-{tag}"
    files = {}
    for rank in range(world):
        for kind in checkpoints.KINDS:
            name, text = f"{kind}-{rank}.safetensors", "x" * (10 + rank)
            run.write_text(f"{folder}/{name}", text)
            files[name] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    meta = {"step": step, "world": world, "score": score, "files": files}
    run.write_text(f"{folder}/meta.json", json.dumps(meta))
    return folder


def test_checkpoints_are_listed_by_step(tmp_path):
    for run in (RunDir(str(tmp_path)), RunDir(f"memory://{tmp_path.name}")):
        assert checkpoints.list_checkpoints(run) == [] and checkpoints.latest_checkpoint(run) is None
        folders = [write(run, step) for step in (200, 50, 1000)]
        run.write_text("checkpoints/checkpoint_manager_snapshot.json", "{}")
        found = checkpoints.list_checkpoints(run)
        assert [info.step for info in found] == [50, 200, 1000]
        assert checkpoints.latest_checkpoint(run).folder == folders[2]


def test_an_archive_beside_the_checkpoints_is_none_and_stays(tmp_path):
    for run in (RunDir(str(tmp_path)), RunDir(f"memory://{tmp_path.name}-archive")):
        folder = write(run, 20)
        run.write_text(f"{folder}.tar", "kept")
        run.write_text("checkpoints/step-00000040-b/rank-0.json", "{}")
        assert [info.folder for info in checkpoints.list_checkpoints(run)] == [folder]
        checkpoint_files.remove_uncommitted(run)
        assert run.list("checkpoints") == [folder.split("/")[1], f"{folder.split('/')[1]}.tar"]


WHOLE = ["meta.json", "model-1.safetensors", "optimizer-0.safetensors",
         "references-1.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("damage", ["absent", "cut", "empty"])
def test_a_half_written_checkpoint_does_not_count(tmp_path, name, damage):
    run = RunDir(str(tmp_path))
    old = write(run, 50)
    path = tmp_path / write(run, 100) / name
    if damage == "absent":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "cut" else 0)
    assert [info.folder for info in checkpoints.list_checkpoints(run)] == [old]
    assert checkpoints.latest_checkpoint(run).step == 50


def test_best_has_the_highest_score_and_is_the_later_on_a_tie(tmp_path):
    run = RunDir(str(tmp_path))
    for step, score in ((10, 3.0), (20, 7.5), (30, 7.5), (40, 1.0), (50, None)):
        write(run, step, score=score)
    assert checkpoints.best_checkpoint(run).step == 30 and checkpoints.latest_checkpoint(run).step == 50


def test_no_checkpoint_is_a_named_error_with_what_was_found(tmp_path):
    run = RunDir(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"no complete checkpoint in {tmp_path}/checkpoints: found nothing"):
        checkpoints.best_checkpoint(run)
    (tmp_path / write(run, 100) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"found .*step-00000100-a.*run directory"):
        checkpoints.best_checkpoint(run)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), st.integers(0, 1000), max_size=20), st.integers(1, 6))
def test_sharing_out_is_complete_even_and_free_of_order(sizes, writers):
    owner = checkpoint_files.share_out(sizes, writers)
    assert owner.keys() == sizes.keys() and set(owner.values()) <= set(range(writers))
    load = [sum(sizes[n] for n in sizes if owner[n] == w) for w in range(writers)]
    assert max(load) - min(load) <= max(sizes.values(), default=0)
    assert checkpoint_files.share_out(dict(reversed(sizes.items())), writers) == owner


SNAPSHOT = "checkpoints/checkpoint_manager_snapshot.json"


@pytest.mark.parametrize("text, stays", [
    ('{"checkpoint_results": [{"checkpoint_dir_name": "step-00000050-a"}]}', True),
    ('{"checkpoint_results": []}', True),
    ('{"checkpoint_results": [{"checkpoint_dir_name": "step-00000050-a"}, {"checkpoint_dir_name": "gone"}]}', False),
    ('{"checkpoint_results": [{"checkpoint_dir', False), ("", False), ("{}", False), ("null", False),
    ("\udcff", False),
])  # fmt: skip
def test_ray_s_list_of_checkpoints_goes_when_it_would_stop_a_restart(tmp_path, text, stays):
    run = RunDir(str(tmp_path))
    checkpoint_files.repair_snapshot(run)
    write(run, 50)
    run.write_bytes(SNAPSHOT, text.encode("utf-8", "surrogateescape"))
    checkpoint_files.repair_snapshot(run)
    assert run.exists(SNAPSHOT) == stays and checkpoints.latest_checkpoint(run).step == 50


# -- integrity -------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    """One bit in the middle of a file; its size stays."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_a_damaged_file_is_named_and_not_loaded(trained, tmp_path, monkeypatch, kind):
    run = RunDir(str(tmp_path))
    trained.save(tmp_path / "checkpoints" / "step-00000002-a", monkeypatch, world=2)
    (info,) = checkpoints.list_checkpoints(run)
    with checkpoints.fetched(run, info, *checkpoints.KINDS) as folder:
        assert sorted(info.files()) == sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))
    damaged = tmp_path / info.folder / f"{kind}-1.safetensors"
    flip_a_byte(damaged)
    others = [k for k in checkpoints.KINDS if k != kind]
    with checkpoints.fetched(run, info, *others):
        pass  # what is not read is not checked
    with (
        pytest.raises(CheckpointError, match=rf"{damaged} is damaged: its SHA-256 is \w+, \w+ was written.*Remove that"),
        checkpoints.fetched(run, info, kind),
    ):
        raise AssertionError("a damaged checkpoint was handed out")


@pytest.fixture(params=["local", "memory"])
def two_checkpoints(request, trained, tmp_path, monkeypatch) -> RunDir:
    """A run with checkpoints of step 2 and of step 4, written by two ranks."""
    run = RunDir(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")
    for step in (2, 4):
        folder = tmp_path / f"step-{step}"
        trained.save(folder, monkeypatch, world=2, step=step)
        for path in folder.iterdir():
            run.write_bytes(f"checkpoints/step-{step:08d}-a/{path.name}", path.read_bytes())
    return run


def test_resume_takes_the_latest_checkpoint(make_config, trained, two_checkpoints):
    other = Training(make_config({**OVERRIDES, "train.seed": 9}))
    with checkpoint_files.resume_point(two_checkpoints, OBJECTS) as at:
        assert at.step == 4 and at.passed_over == []
        at.load(other.engine, other.bank)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), trained.model.parameters(), strict=True))
    assert two_checkpoints.local == os.path.exists(at.folder), "a download is removed, the checkpoint itself is not"


@pytest.mark.parametrize("older", [False, True])
def test_a_node_downloads_what_it_needs_alone(make_config, trained, two_checkpoints, monkeypatch, older):
    """Rank 1 of two, each on a node of its own. What an older version wrote does not say whose rows a file has."""
    run, name = two_checkpoints, "checkpoints/step-00000004-a/meta.json"
    if older:
        meta = run.read_json(name)
        for found in meta["files"].values():
            found.pop("rows", None)
        run.write_text(name, json.dumps(meta))
    told = iter([[checkpoints.inspect_checkpoints(run), []]])
    others = {tuple: ("another node", "/nowhere"), list: [], type(None): None}
    config = make_config({**OVERRIDES, "train.seed": 9})
    engine = Training(config).engine
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "gather_objects", lambda own: next(told, [others[type(own)], own]))
    bank = type(trained.bank)(OBJECTS, trained.bank.dim, config.reference, 0)
    with checkpoint_files.resume_point(run, OBJECTS) as at:
        if not run.local:
            rows = ["references-0.safetensors"] * older + ["references-1.safetensors"]
            both = [f"{kind}-{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)]
            assert sorted(os.listdir(at.folder)) == both + rows
        at.load(engine, bank)
    assert bank.first == OBJECTS // 2
    assert torch.equal(bank.rows, trained.bank.rows[bank.first :]), "its own rows, whoever wrote them"


def test_resume_passes_a_damaged_checkpoint_over_and_says_so(two_checkpoints, caplog):
    run, name = two_checkpoints, "checkpoints/step-00000004-a/optimizer-1.safetensors"
    data = bytearray(run.read_bytes(name))
    data[-1] ^= 1
    run.write_bytes(name, bytes(data))
    with checkpoint_files.resume_point(run, OBJECTS) as at:
        assert at.step == 2 and len(at.passed_over) == 1
    assert f"{run.join(name)} is damaged" in caplog.text and "step 4 is not used" in caplog.text


def test_resume_names_every_file_that_is_gone_or_short(two_checkpoints):
    run = two_checkpoints
    gone, short = (f"checkpoints/step-00000004-a/{name}" for name in ("model-0.safetensors", "optimizer-1.safetensors"))
    run.remove(gone)
    run.write_bytes(short, run.read_bytes(short)[:-1])
    with checkpoint_files.resume_point(run, OBJECTS) as at:
        assert at.step == 2
        assert sorted(p.split(" ", 1)[0] for p in at.passed_over) == [run.join(gone), run.join(short)]
        assert {p.split(" ")[2].rstrip(":") for p in at.passed_over} == {"gone", "damaged"}


@pytest.mark.parametrize("damaged", [b"{", b'{"step": 4, "files": {"\xff": {}}}', b'{"files": {}}', b"[]"])
def test_resume_names_a_list_of_files_that_cannot_be_read(two_checkpoints, damaged):
    where = "checkpoints/step-00000004-a/meta.json"
    two_checkpoints.write_bytes(where, damaged)
    with checkpoint_files.resume_point(two_checkpoints, OBJECTS) as at:
        assert at.step == 2 and at.passed_over[0].startswith(f"{two_checkpoints.join(where)} is damaged")


def test_without_a_sound_checkpoint_training_does_not_start_again(two_checkpoints):
    run = two_checkpoints
    for info in checkpoints.list_checkpoints(run):
        run.write_bytes(f"{info.folder}/model-0.safetensors", b"x" * info.files()["model-0.safetensors"]["bytes"])
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is sound.*model-0.*from the beginning"):
        checkpoint_files.resume_point(run, OBJECTS).__enter__()


def test_a_run_without_checkpoints_begins_at_the_beginning(trained, tmp_path):
    with checkpoint_files.resume_point(RunDir(str(tmp_path)), OBJECTS) as at:
        before = [p.clone() for p in trained.model.parameters()]
        at.load(trained.engine, trained.bank)
    assert at.step == 0 and all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters()))


def test_a_snapshot_is_apart_from_what_training_changes(trained, tmp_path):
    state = checkpoint_files.snapshot(trained.engine, trained.bank, {"step": 2})
    before = {kind: {n: t.clone() for n, t in tensors.items()} for kind, tensors in state.tensors.items()}
    with torch.no_grad():
        for tensor in (*trained.model.parameters(), *trained.model.buffers(), *trained.bank.state_dict().values()):
            tensor.add_(1)
        for moments in trained.engine.optimizer.state.values():
            moments["exp_avg"].add_(1)
    for kind, tensors in state.tensors.items():
        assert tensors and all(torch.equal(t, before[kind][n]) for n, t in tensors.items()), kind
    assert state.bytes == sum(t.nbytes for tensors in before.values() for t in tensors.values())


def test_a_checkpoint_does_not_exist_before_every_rank_has_written(trained, tmp_path, monkeypatch):
    run, folder = RunDir(str(tmp_path)), "checkpoints/step-00000002-a"
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    states = []
    for rank in (0, 1):
        monkeypatch.setattr(collectives, "rank", lambda r=rank: r)
        states.append(checkpoint_files.snapshot(trained.engine, trained.bank, {"step": 2}))
    monkeypatch.undo()
    checkpoint_files.write(run, folder, states[0], 0)
    waiting = threading.Thread(target=checkpoint_files.commit, args=(run, folder, states[0].meta), daemon=True)
    waiting.start()
    waiting.join(timeout=0.2)
    assert waiting.is_alive() and checkpoints.list_checkpoints(run) == [] and not run.exists(f"{folder}/meta.json")
    checkpoint_files.write(run, folder, states[1], 1)
    waiting.join(timeout=60)
    (info,) = checkpoints.list_checkpoints(run)
    assert len(info.files()) == 6 and info.meta["world"] == 2

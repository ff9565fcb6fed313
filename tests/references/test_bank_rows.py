"""Objects added to and removed from the references of a finished run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.plain_training import PlainTraining
from support.tiny_run import UNSEEN, make_run

from mmref.cli import main
from mmref.data.shard_set import ShardSet
from mmref.errors import CheckpointError, ReferencesError, RunDirectoryError
from mmref.evaluate.report import render_report
from mmref.model.reference_rows import group_means, warm_rows
from mmref.references import bank_rows
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files
from mmref.train.bank import ReferenceBank


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(params=["gradient", "moving_average"])
def config(make_config, request):
    return make_config({"reference.update": request.param, "reference.per_object": 2})


@pytest.fixture(params=["local", "memory"])
def run(config, tmp_path, request):
    """A run with two checkpoints, rows written by one rank in the first and by three in the second."""
    path = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}-{request.param_index}/run"
    made = RunDir(path)
    make_run(config, path, {})
    info = checkpoints.latest_checkpoint(made)
    with checkpoints.fetched(made, info, *checkpoints.KINDS) as folder:
        model, moments = (load_file(f"{folder}/{kind}-0.safetensors") for kind in ("model", "optimizer"))
        whole = load_bank(folder, info.meta, config)
    folder = "checkpoints/step-00000030-b"
    share = -(-whole.objects // 3)
    files = {}
    for rank, first in enumerate(range(0, whole.objects, share)):
        part = slice(first, first + share)
        rows = {k: v[part].clone() for k, v in whole.state_dict().items()}
        tensors = rows | checkpoint_files.pack_ids(whole.object_ids[first : first + share])
        name = f"references-{rank}.safetensors"
        files[name] = checkpoint_files.write_file(made, f"{folder}/{name}", tensors, first)
    for kind, tensors in (("model", model), ("optimizer", moments)):
        files[f"{kind}-0.safetensors"] = checkpoint_files.write_file(made, f"{folder}/{kind}-0.safetensors", tensors, 0)
    made.write_text(f"{folder}/rank-0.json", json.dumps(files))
    made.write_text(f"{folder}/meta.json", json.dumps({**info.meta, "step": 30, "score": 99.0, "files": files}))
    return made


def load_bank(folder, meta, config, object_ids=None):
    """The bank of one rank that resumes with these objects."""
    object_ids = object_ids or checkpoints.load_object_ids(folder, meta)
    bank = ReferenceBank(len(object_ids), meta["bank"]["dim"], config.reference, 0, object_ids=object_ids)
    checkpoint_files.load_bank(folder, bank, meta)
    return bank


def contents(run, config):
    """{checkpoint: {object id: {tensor name: row}}} of a run."""
    found = {}
    for info in checkpoints.list_checkpoints(run):
        with checkpoints.fetched(run, info, "references") as folder:
            bank = load_bank(folder, info.meta, config)
            assert bank.objects == info.meta["bank"]["objects"] == len(checkpoints.load_references(folder, info.meta))
            rows = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
        found[info.folder] = {o: {n: t[i] for n, t in rows.items()} for i, o in enumerate(bank.object_ids.to_pylist())}
    return found


def every_byte(run):
    """Bytes of all files of the run that are not weights, by path."""
    names = run.fs.find(run.root)
    return {name: run.fs.cat_file(name) for name in names if "/model-" not in name and "/optimizer-" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_removed_object_is_in_no_file_and_the_others_are_as_before(run, config):
    before = contents(run, config)
    run.write_text("checkpoints/step-00000040-c/references-0.safetensors", "half-written thing.5")
    named = "thing.5", "thing.5_0", "thing.5-front", "thing.5.0", "a/thing.5.png", "thing.5/0"
    run.write_text("bad_samples.json", json.dumps([f"a.tar:{i}: broken" for i in (*named, "thing.55")]))
    run.write_text("report.html", "<div>thing.5</div>")
    run.write_text("report-other.html", "<div>thing.55</div>")
    run.write_bytes("explain/1-object-5.png", b"a picture of thing.5")
    run.write_text("start/checkpoints/step-00000000-s/references-0.safetensors", "what training began with: thing.5")
    gone = {"thing.5", "thing.0", "thing.13"}
    removed = bank_rows.remove_objects(run.path, gone)
    assert (removed.objects, removed.checkpoints, removed.unfinished) == (3, 2, 1)
    assert sorted(removed.reports) == ["bad_samples.json", "explain/", "report.html"]
    after = contents(run, config)
    assert len(after) == 2
    for folder, rows in after.items():
        assert rows.keys() == before[folder].keys() - gone
        assert all(same(rows[name], before[folder][name]) for name in rows)
    assert json.loads(run.read_text("bad_samples.json")) == ["a.tar:thing.55: broken"]
    assert not run.exists("report.html") and run.exists("report-other.html")
    for path, data in every_byte(run).items():
        for folder in before:
            for name in gone:
                assert before[folder][name]["rows"].numpy().tobytes() not in data or not before[folder][name]["rows"].any(), path
        assert b"thing.5" not in data.replace(b"thing.55", b""), path
    for info in checkpoints.list_checkpoints(run):
        assert info.meta["removed"] == 3
        assert set(run.list(info.folder)) == {"meta.json", *info.meta["files"]}, "nothing that is not listed"


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_report_whose_pictures_show_a_removed_object_is_deleted(run, split):
    """Pictures are labelled with captions: what tells the object is a mark that nobody sees."""

    def page(object_id):
        result = {
            "image": b"png",
            "ext": "png",
            "object_id": object_id,
            "label": "a bird",
            "image_id": "7",
            "score": 1,
            "hit": True,
        }
        named = {"query": "a bird", "kind": "", "object_id": "of test", "label": "a bird", "rank_before": 1, "rank_after": 1}
        example = {**named, "before": [result], "after": [result]}
        opening = {"moves": {"up": 0, "down": 0, "same": 1}, "examples": [example] if split == "test" else []}
        scores = {"initial": {}, "refined": {}, "split": split, "n_queries": 1, "n_gallery": 1, "n_objects": 1}
        further = [] if split == "test" else [example]
        return render_report(metrics=scores, history=[], opening=opening, examples=further, title="", config={})

    run.write_text("report.html", page("thing.5"))
    run.write_text("report-other.html", page("thing.55"))
    assert bank_rows.remove_objects(run.path, ["thing.5"]).reports == ["report.html"]
    assert not run.exists("report.html") and run.exists("report-other.html")


def test_a_second_removal_adds_to_the_count_and_an_unknown_object_is_named(run, config):
    bank_rows.remove_objects(run.path, ["thing.1"])
    with pytest.raises(ReferencesError, match=r"1 of 2 objects have no references .*'thing.1'; 1 were removed"):
        bank_rows.remove_objects(run.path, ["thing.1", "thing.2"])
    for rows in contents(run, config).values():
        assert not {"thing.1", "thing.2"} & rows.keys() and len(rows) == 12
    assert checkpoints.latest_checkpoint(run).meta["removed"] == 2
    with pytest.raises(ReferencesError, match="no reference would be left"):
        bank_rows.remove_objects(run.path, [f"thing.{i}" for i in range(14)])
    assert all(len(rows) == 12 for rows in contents(run, config).values())


@pytest.mark.parametrize("at", range(1, 8))
def test_a_removal_that_is_interrupted_leaves_sound_checkpoints_and_can_be_repeated(run, config, monkeypatch, at):
    """Interrupted at each of its writes and deletions in turn."""
    before, calls = contents(run, config), []

    def interrupted(name):
        original = getattr(RunDir, name)

        def call(self, *args):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(RunDir, name, call)

    for name in ("write_stream", "write_text", "remove"):
        interrupted(name)
    with pytest.raises(KeyboardInterrupt):
        bank_rows.remove_objects(run.path, ["thing.3", "thing.12"])
    monkeypatch.undo()
    for folder, rows in contents(run, config).items():
        assert rows.keys() in (before[folder].keys(), before[folder].keys() - {"thing.3", "thing.12"})
    try:
        assert bank_rows.remove_objects(run.path, ["thing.3", "thing.12"]).objects == 2
    except ReferencesError:  # it had only files left to delete
        assert at > 5
    for folder, rows in contents(run, config).items():
        assert rows.keys() == before[folder].keys() - {"thing.3", "thing.12"}
    assert not any(b"thing.3" in data or b"thing.12" in data for data in every_byte(run).values())


def test_a_removal_that_cannot_be_done_everywhere_is_done_nowhere(run, config):
    """One checkpoint has objects that the others have not; what an interrupted addition left is cleared by the next."""
    info = checkpoints.latest_checkpoint(run)
    run.write_bytes(f"{info.folder}/references-half.safetensors", b"half")
    bank_rows.append_rows(run, info, ["new.1"], torch.ones(1, 2, info.meta["bank"]["dim"]))
    assert "references-half.safetensors" not in run.list(info.folder)
    before = every_byte(run)
    with pytest.raises(ReferencesError, match="no reference would be left"):
        bank_rows.remove_objects(run.path, [f"thing.{i}" for i in range(14)])
    assert {n: b for n, b in every_byte(run).items() if not n.endswith(".lock")} == before


def test_references_are_changed_by_one_command_at_a_time(run, tiny_set):
    if not run.local:
        pytest.skip("behind a URL nobody can tell")
    with run.held():
        with pytest.raises(RunDirectoryError, match="is in use: process"):
            bank_rows.remove_objects(run.path, ["thing.3"])
        with pytest.raises(RunDirectoryError, match="is in use: process"):
            bank_rows.add_objects(run.path, str(tiny_set))


def test_a_damaged_checkpoint_stops_a_removal(run):
    info = checkpoints.latest_checkpoint(run)
    name = f"{info.folder}/references-1.safetensors"
    data = bytearray(run.read_bytes(name))
    data[-1] ^= 1
    run.write_bytes(name, bytes(data))
    with pytest.raises(CheckpointError, match=r"references-1.safetensors is damaged"):
        bank_rows.remove_objects(run.path, ["thing.3"])


def test_added_objects_stand_behind_the_old_ones_with_fresh_state(run, config):
    before = contents(run, config)
    best = checkpoints.best_checkpoint(run)
    rows = torch.randn(3, 2, best.meta["bank"]["dim"])
    names = ["new.a", "née", "new.c"]
    bank_rows.append_rows(run, best, names, rows)
    after = contents(run, config)
    for folder, held in before.items():
        assert all(same(after[folder][name], held[name]) for name in held)
        assert after[folder].keys() - held.keys() == (set(names) if folder == best.folder else set())
    for name, row in zip(names, rows):
        added = after[best.folder][name]
        assert torch.equal(added.pop("rows"), row) and all((state == 0).all() for state in added.values())
    info = checkpoints.best_checkpoint(run)
    with checkpoints.fetched(run, info, "references") as folder:
        assert checkpoints.load_object_ids(folder, info.meta)[-3:] == names
        assert torch.equal(checkpoints.load_references(folder, info.meta)[-3:], rows)
        # training goes on with a set of old and new objects in an order of its own, without others
        bank = load_bank(folder, info.meta, config, ["née", "thing.3", "never.seen", "new.c"])
    assert torch.equal(bank.rows[[0, 3]], rows[[1, 2]])
    assert torch.equal(bank.rows[1], before[best.folder]["thing.3"]["rows"])
    bank_rows.append_rows(run, info, ["new.d"], rows[:1])
    assert bank_rows.remove_objects(run.path, ["née", "thing.4"]).objects == 2
    assert list(contents(run, config)[best.folder])[-3:] == ["new.a", "new.c", "new.d"]


def test_what_there_is_is_said(run, config, capsys):
    unseen, *_, seen = ShardSet.open(config.data.root).train_object_ids()
    assert main(["references", "info", run.path, "--object", unseen, seen, "nobody"]) == 0
    said = capsys.readouterr().out
    count = 14 if config.reference.update == "gradient" else 14 - UNSEEN
    line = f"step-00000030-b (best): 14 objects x 2 references of width 8, {count} of them set, "
    assert line in said and said.count("nobody: not there") == said.count(f"{seen}: set") == 2
    assert (f"{unseen}: there, not set yet" in said) == (count < 14)
    assert main(["references", "remove", run.path]) == 2
    assert "no object named" in capsys.readouterr().err


def test_objects_to_remove_come_from_a_file_too(run, config, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("thing.6\n\n thing.7 \n")
    assert main(["references", "remove", run.path, "--object", "thing.8", "--file", str(tmp_path / "ids.txt")]) == 0
    said = capsys.readouterr().out
    assert "3 objects removed from 2 checkpoints" in said and "thing." not in said
    assert all(not {"thing.6", "thing.7", "thing.8"} & rows.keys() for rows in contents(run, config).values())
    assert main(["references", "remove", run.path, "--file", str(tmp_path / "none.txt")]) == 1
    assert "none.txt cannot be read" in capsys.readouterr().err


def test_training_starts_from_another_run(run, make_config, config, tmp_path):
    """Weights and the references of the objects that both have; optimizer state is new."""
    index = ShardSet.open(config.data.root).index("train")
    fresh = PlainTraining(
        make_config({"train.seed": 5, "reference.update": config.reference.update, "reference.per_object": 2, "loss.tau": 0.03})
    )
    tau = fresh.model.log_scale.clone()
    engine = SimpleNamespace(module=fresh.model, optimizer=torch.optim.AdamW(fresh.model.parameters()))
    object_ids = ["somebody", *list(index.object_ids)[1:]]
    bank = ReferenceBank(len(object_ids), fresh.model.embed_dim, config.reference, 5, object_ids=object_ids)
    before = {k: v.clone() for k, v in bank.state_dict().items()}
    checkpoint_files.start_from(run, engine, bank)
    info = checkpoints.best_checkpoint(run)
    with checkpoints.fetched(run, info, *checkpoints.KINDS) as folder:
        saved = load_file(f"{folder}/model-0.safetensors")
        rows = checkpoints.load_references(folder, info.meta)
    for name, parameter in fresh.model.named_parameters():
        assert torch.equal(parameter, saved[name]) == (name != "log_scale"), name
    assert torch.equal(fresh.model.log_scale, tau), "of this run's config"
    assert torch.equal(bank.rows[1:], rows[1:]) and torch.equal(bank.rows[0], before["rows"][0])
    assert rows[UNSEEN:].abs().sum() > 0
    for name, state in bank.state_dict().items():
        assert name == "rows" or torch.equal(state, before[name])
    for state in engine.optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any()


def test_training_starts_from_a_run_with_other_heads(run, make_config, config):
    """A classifier has a row for each object of its own set; heads that one of the two has not are left out, or begin anew."""
    overrides = {"reference.update": config.reference.update, "reference.per_object": 2, "loss.align": "sigmoid"}
    model = PlainTraining(make_config({**overrides, "loss.w_rec": 0.5, "loss.w_id": 0.5})).model
    engine = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bank = ReferenceBank(3, model.embed_dim, config.reference, 5, object_ids=["a", "b", "c"])
    checkpoint_files.start_from(run, engine, bank)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    new = {n for n in before if n.startswith(("classify.", "reconstruct.", "logit_bias"))}
    assert changed and new and not changed & new
    assert changed | new | {"log_scale"} >= {n for n, p in before.items() if p.dim() > 1}


# -- rows of an object that training has not seen ----------------------------------------------------------------------


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_one_reference_is_the_mean_of_both_modalities():
    image, text = unit(3, 6), unit(50, 6, seed=1)
    for assign in ("nearest", "modality"):
        rows = warm_rows(image, text, 1, assign)
        torch.testing.assert_close(rows, ((image.mean(0) + text.mean(0)) / 2)[None])
    torch.testing.assert_close(warm_rows(image, text[:0], 1, "nearest"), image.mean(0, keepdim=True))
    assert (warm_rows(image[:0], text[:0], 2, "nearest") == 0).all()


def test_several_references_are_the_groups_of_the_features():
    centres = torch.eye(6)[:3]
    group = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 2])
    features = torch.nn.functional.normalize(centres[group] + 0.05 * unit(10, 6), dim=-1)
    rows = warm_rows(features[:5], features[5:], 3, "nearest")
    order = (rows @ centres.T).argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    for row, which in zip(rows, order):
        torch.testing.assert_close(row, features[group == which].mean(0))
    by_modality = warm_rows(features[:5], features[5:], 4, "modality")
    torch.testing.assert_close(by_modality[0::2], group_means(features[:5], torch.full((5,), 0.2), 2))
    torch.testing.assert_close(by_modality[1::2], group_means(features[5:], torch.full((5,), 0.2), 2))


def test_fewer_features_than_references_leave_the_rest_unseen():
    features = unit(2, 6)
    rows = group_means(features[[0, 1, 0]], torch.ones(3), 5)
    assert np.count_nonzero(rows.abs().sum(1)) == 2 and (rows[2:] == 0).all()
    assert {tuple(r.tolist()) for r in rows[:2].round(decimals=5)} == {tuple(r.tolist()) for r in features.round(decimals=5)}

"""Numbers of a run in other services: one seam, and a run that none of them can stop."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from mmref.errors import SinkError
from mmref.run.directory import RunDir, read_jsonl
from mmref.run.progress import log_line
from mmref.train import sinks as seam
from mmref.train.logs import RunLog
from mmref.train.sinks import Sinks, available, check_sinks, load_sink, plain_name, run_of

MODULE = """
made = []

class Notes:
    def __init__(self, about):
        self.about, self.lines, self.closed = about, [], False
        made.append(self)
    def log(self, step, values):
        self.lines.append((step, values))
    def close(self):
        self.closed = True

class Failing(Notes):
    def log(self, step, values):
        super().log(step, values)
        raise SystemExit("the service says no\\nat great length")

def needy(about):
    raise AssertionError("it was not to be made")

needy.requires = ("no_such_package_at_all",)
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A package somewhere on the path that provides sinks by entry points."""
    site = tmp_path / "site"
    folder = site / "sinks_of_ours-1.0.dist-info"
    folder.mkdir(parents=True)
    (site / "sinks_of_ours.py").write_text(MODULE)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sinks-of-ours\nVersion: 1.0\n")
    points = {"notes": "Notes", "failing": "Failing", "needy": "needy", "gone": "Gone"}
    (folder / "entry_points.txt").write_text(
        "[mmref.sinks]\n" + "".join(f"{name} = sinks_of_ours:{what}\n" for name, what in points.items())
    )
    monkeypatch.syspath_prepend(str(site))
    import sinks_of_ours

    sinks_of_ours.made.clear()
    yield sinks_of_ours.made


@pytest.fixture
def log(make_config, tmp_path):
    """What makes the log of a run with some sinks."""

    def make(*names, start=0):
        run = RunDir(str(tmp_path / "run"))
        config = make_config({"train.sinks": list(names), "train.lr": 0.002})
        check_sinks(config)
        return RunLog(run, start, Sinks(names, run_of(config, run, start)))

    return make


RECORDS = (
    {"step": 0, "started": 1.0, "workers": 1, "passed_over": []},
    {"step": 4, "pace": 9.0, "pace_seconds": 0.1},
    {"step": 10, "loss": 2.0, "loss_align": 1.5, "lr": 0.1},
    {"step": 10, "val_R@1": 40.0, "val_refine_kind": "sparse", "eval_seconds": 1.0},
)


def test_a_sink_gets_the_numbers_of_the_log_by_names_that_all_take(notes, log, tmp_path):
    records = log("notes")
    for record in RECORDS:
        records(record)
    records.close()
    (sink,) = notes
    assert sink.lines == [(10, {"loss": 2.0, "loss/align": 1.5, "lr": 0.1}), (10, {"val/R_at_1": 40.0, "eval/seconds": 1.0})]
    assert sink.closed and [r["step"] for r in read_jsonl(RunDir(str(tmp_path / "run")))] == [0, 4, 10, 10]
    about = sink.about
    assert (about.name, about.path, about.start) == ("run", str(tmp_path / "run"), 0)
    assert about.config["train"]["lr"] == 0.002 and len(about.config["config_hash"]) == 12


def test_a_resumed_run_is_known_by_its_id(notes, log, tmp_path):
    log("notes").close()
    log("notes", start=10).close()
    assert notes[0].about.id == notes[1].about.id and notes[1].about.start == 10
    (tmp_path / "run" / seam.ID).unlink()
    log("notes").close()
    assert notes[2].about.id != notes[0].about.id


def test_a_sink_that_fails_is_said_once_and_costs_nothing_else(notes, log, tmp_path):
    records = log("failing", "notes")
    records(RECORDS[2])
    failing = next(t for t in records.sinks._threads if t.name == "failing")
    failing._thread.join(10)
    for step in (20, 30):
        records({"step": step, "loss": 1.0})
    records.close()
    lines = read_jsonl(RunDir(str(tmp_path / "run")))
    assert [line["loss"] for line in lines if "loss" in line] == [2.0, 1.0, 1.0]
    (failure,) = [line for line in lines if "sink" in line]
    assert failure["step"] <= 20 and failure["sink"] == "failing"
    said = "failing of `train.sinks` gets nothing more: SystemExit: the service says no. The run goes on"
    assert said in log_line(failure, 40, None)
    one = next(sink for sink in notes if type(sink).__name__ == "Failing")
    other = next(sink for sink in notes if type(sink).__name__ == "Notes")
    assert len(one.lines) == 1 and len(other.lines) == 3, "the other one goes on"


def test_a_service_that_hangs_stops_neither_training_nor_its_end(notes, log, tmp_path, monkeypatch):
    monkeypatch.setattr(seam, "PATIENCE_S", 0.2)
    records = log("notes")
    gate = threading.Event()
    while not notes:
        time.sleep(0.01)
    notes[0].log = lambda step, values: gate.wait(30)
    began = time.perf_counter()
    for step in (10, 20, 30):
        records({"step": step, "loss": 1.0})
    records.close()
    assert time.perf_counter() - began < 10
    gate.set()
    last = read_jsonl(RunDir(str(tmp_path / "run")))[-1]
    assert last["step"] == 30 and last["sink_failure"] == "it has not sent everything 0.2 s after the end of training"


def test_what_is_no_sink_is_named_before_a_run_starts(notes, make_config, tmp_path):
    assert {"wandb", "mlflow", "trackio", "notes"} <= set(available())
    with pytest.raises(SinkError, match=r"`train.sinks` names 'wandbb', .*there are .*notes.*wandb"):
        check_sinks(make_config({"train.sinks": ["wandbb"]}))
    (tmp_path / "site" / "no_such_package_at_all").mkdir()  # a folder of its name makes none
    with pytest.raises(SinkError, match=r"needy needs the package no_such_package_at_all, .*pip install no_such_package_at_all"):
        check_sinks(make_config({"train.sinks": ["notes", "needy"]}))
    with pytest.raises(SinkError, match=r"gone is at sinks_of_ours:Gone, which cannot be imported"):
        load_sink("gone")


@pytest.mark.parametrize("name, plain", [
    ("val/R@1", "val/R_at_1"), ("loss/align", "loss/align"), ("step_seconds", "step_seconds"), ("a b:c", "a_b_c"),
])  # fmt: skip
def test_names(name, plain):
    assert plain_name(name) == plain


# -- the real ones, where they are installed ---------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch):
    """Services take seconds to import and to start, and more on a busy machine."""
    monkeypatch.setattr(seam, "PATIENCE_S", 300.0)


def write(records):
    for record in RECORDS:
        records(record)
    records({"step": 20, "loss": 1.0})
    records.close()


def test_wandb_offline(log, patient, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(log("wandb"))
    assert not [r for r in read_jsonl(RunDir(str(tmp_path / "run"))) if "sink" in r]
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.name == f"run-{(tmp_path / 'run' / seam.ID).read_text()}.wandb"
    data = written.read_bytes()
    assert b"val/R_at_1" in data and b"loss/align" in data and b"0.002" in data, "the numbers, and the config"


def test_mlflow_in_the_run_directory(log, patient, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(log("mlflow"))
    write(log("mlflow", start=10))
    assert not [r for r in read_jsonl(RunDir(str(tmp_path / "run"))) if "sink" in r]
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("mmref")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.002" and found.data.metrics["val/R_at_1"] == 40.0
    assert {m.step for m in client.get_metric_history(found.info.run_id, "loss")} == {10, 20}


def test_trackio_on_this_machine(log, patient, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    write(log("trackio"))
    assert not [r for r in read_jsonl(RunDir(str(tmp_path / "run"))) if "sink" in r]
    (base,) = Path(tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(base) as read:
        lines = [json.loads(row[0]) for row in read.execute("select metrics from metrics order by step")]
    assert {"val/R_at_1", "loss/align"} <= set().union(*lines)

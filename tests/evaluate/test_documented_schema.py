"""docs/run-directory.md names every field of a run's JSON files, and none that is not there."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_run import make_run, random_features

from mmref.config import Config
from mmref.data.shard_set import ShardSet
from mmref.evaluate import close_match, evaluation
from mmref.evaluate.metrics import METRIC_NAMES
from mmref.evaluate.shares import ALONE
from mmref.losses.objective import LOSSES
from mmref.references.bank_rows import remove_objects
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files
from mmref.train import loop as training
from mmref.train.saver import Saver
from mmref.train.sinks import SinkRun, Sinks
from mmref.train.speed import Speed
from mmref.train.validation import Validation

PAGE = Path(__file__).parents[2] / "docs" / "run-directory.md"
SCORES = dict.fromkeys(METRIC_NAMES, 1.0)


def documented(heading: str) -> set[str]:
    """First cells of the tables below a heading of the page, up to the next one."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    assert section, f"no section {heading}"
    return set(re.findall(r"^\| `([^`]+)` \|", section[1], re.M))


def named(value: Any, name: str = "") -> Iterator[str]:
    """Fields of a JSON value as the page writes them: a.b, a[].b, and <metric>, <kind> or <file> for what varies."""
    if isinstance(value, dict) and value and not _whole(value, name):
        for key, inner in value.items():
            yield from named(inner, f"{name}.{_stands_for(name, key)}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from named(inner, f"{name}[]")
    else:
        yield name


def _whole(value: dict[str, Any], name: str) -> bool:
    """Whether a mapping is one field of the page: scores, intervals, and what a val evaluation adds to its scores."""
    numbers = set(value) == set(METRIC_NAMES) and not any(isinstance(v, dict) for v in value.values())
    return numbers or name in ("val", "val_refine_gain")


def _stands_for(name: str, key: str) -> str:
    if name in ("by_caption_kind", "files"):
        return {"by_caption_kind": "<kind>", "files": "<file>"}[name]
    return re.sub("|".join(rf"(?<![^_]){re.escape(m)}$" for m in METRIC_NAMES), "<metric>", key)


@pytest.fixture
def config(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return make_config({
        "eval.bootstrap": 20, "eval.class_protocol": True, "eval.refine_in_training": True, "loss.learn_tau": True,
        "loss.align": "sigmoid", "eval.image_to_image": True, "eval.same_camera": "image_id", "eval.captions_as_one": "image",
    })  # fmt: skip


def test_metrics_json(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_features", random_features)
    monkeypatch.setattr(close_match, "FEWEST", 1)
    make_run(config, str(tmp_path), {})
    line = {"step": 20, **{f"test_{m}": v for m, v in SCORES.items()}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")  # of `eval.test_in_training`
    scores = dict.fromkeys(("initial", "refined", "ci95_initial", "ci95"), SCORES)
    (tmp_path / evaluation.START_METRICS).write_text(json.dumps({"model": "clip", "split": "test", **scores}))
    evaluation.evaluate_run(str(tmp_path), report=False)
    written = set(named(json.loads((tmp_path / "metrics.json").read_text())))
    assert {"best_on_test.<metric>", "refinement.tried[].objective", "by_caption_kind.<kind>.ci95"} <= written
    assert written == documented("metrics.json")


class Scored:
    """A validation whose scores are given."""

    encode_seconds, rank_seconds = 2.0, 1.0

    def __init__(self, scores: dict[str, Any]) -> None:
        self.scores = scores

    def __call__(self, *_: Any) -> dict[str, Any]:
        return self.scores


class Saved:
    """A saver that keeps what it is given for meta.json."""

    def save(self, meta: dict[str, Any], metrics: dict[str, Any]) -> float:
        self.meta = meta
        return 0.1


@pytest.fixture
def evaluated(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of an evaluation in training with every option, and what it gives a checkpoint."""
    validation, rng = Validation(config), np.random.default_rng(0)
    references, text, image = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((14, 1, 8), (len(validation.queries.texts), 8), (len(validation.objects), 8))
    )
    scores = SCORES | validation._refined(references, text, image, validation.objects, ALONE)
    monkeypatch.setattr(training, "average_statistics", lambda module: None)
    saver, ledger = Saved(), SimpleNamespace(write=lambda done: None)
    worker: Any = SimpleNamespace(
        config=config, engine=SimpleNamespace(module=None), bank=None, encoder=None, ledger=ledger,
        validation=Scored(scores), testing=Scored(SCORES),
        _check_weights=lambda done: None, _write_bad=lambda: None,
    )  # fmt: skip
    record = training.Worker._evaluate_and_save(worker, 20, saver, evaluate=True)  # type: ignore[arg-type]
    assert (record["eval_encode_seconds"], record["eval_rank_seconds"]) == (4.0, 2.0), "of val and test"
    return record, saver.meta


def test_metrics_jsonl(
    config: Config, evaluated: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = Speed(config, torch.device("cpu"), False, True, 0)
    speed.flops, speed.on_gpu = 1e9, True
    window = training.Window(torch.device("cpu"))
    window.add(0, torch.ones(len(LOSSES)), 1.0, 1.0)
    worker: Any = SimpleNamespace(
        config=config, world=1, device=torch.device("cpu"), bad=set(), bad_before=set(),
        ahead=SimpleNamespace(waited_s=0.0), runner=SimpleNamespace(logits=[torch.tensor([10.0]), torch.tensor([-9.0])]),
        engine=SimpleNamespace(get_global_grad_norm=lambda: 1.0), speed=speed, division=SimpleNamespace(clean_share=0.9),
    )  # fmt: skip
    line = training.Worker._line(worker, 1, 0.1, window)

    monkeypatch.setattr(checkpoint_files, "write", lambda *_: None)
    monkeypatch.setattr(checkpoint_files, "commit", lambda *_: None)
    saver: Any = SimpleNamespace(run=None, _error=None, _finished=[], _idle=threading.Event())
    Saver._write(saver, "checkpoints/one", checkpoint_files.Snapshot({}, 0, {"step": 1}), 0, 0.0)

    records: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "RunLog", lambda run, start, sinks: Log(records))
    warned: Any = SimpleNamespace(
        config=config, rank=0, run=None, start=20, world=2, passed_over=["damaged"], _write_bad=lambda: None
    )
    with training.Worker._logging(warned):
        pass
    pace = training.Pace(20, 8)
    paces = [record for done in range(21, 30) if (record := pace(done))]
    sinks = Sinks(["nobody's"], SinkRun("id", "run", "", None, 0, {}))
    sinks.close()
    kinds = [line, evaluated[0], *saver._finished, *records, *paces, *sinks.failures(20)]
    assert len(kinds) == 6
    assert set().union(*map(named, kinds)) == documented("metrics.jsonl")


class Log:
    """A log that keeps its records."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def test_meta_json(config: Config, evaluated: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    make_run(config, str(tmp_path), {})
    run = RunDir(str(tmp_path))
    remove_objects(str(tmp_path), [str(ShardSet.open(config.data.root).index("train").object_ids[0])])
    found = checkpoints.best_checkpoint(run)
    assert set(named({**evaluated[1], **found.meta})) == documented("meta.json")
    tensors = {name.split("-")[0] for name in found.meta["files"]}
    assert tensors == set(checkpoints.KINDS)


def test_nonfinite_json(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = SimpleNamespace(
        rank=0, run=RunDir(str(tmp_path)), config=config, ledger=SimpleNamespace(images=lambda step, plan: [0, 1])
    )
    with pytest.raises(training.NonFiniteLossError, match="step 7"):
        training.Worker._stop(worker, 7, "the loss of step {}", "Lower it.")
    written = json.loads((tmp_path / "nonfinite.json").read_text())
    assert written["step"] == 7
    assert set(written) == documented("bad_samples.json and nonfinite.json")

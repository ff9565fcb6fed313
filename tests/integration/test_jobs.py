"""The jobs as a user starts them: trained, killed, resumed, evaluated."""

from __future__ import annotations

import gzip
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.jobs import Job, lines_of_ray, losses, records, wait_for, write_config

from mmref.config import Config
from mmref.run.directory import RunDir
from mmref.train.ledger import audit_run, plan_of, read_ledger

STEPS, EVERY = 120, 30
KEYS = {"step", "loss", "loss_align", "loss_fuse", "loss_rec", "loss_guide", "images_per_second", "data_wait"}


@pytest.fixture(scope="module")
def config_file(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_set import tiny_config

    overrides = {
        "train.workers": 2, "train.max_steps": STEPS, "train.log_every": 1, "train.eval_every": EVERY,
        "train.storage_gb": 0.2, "loss.w_rec": 0.2, "eval.bootstrap": 100, "eval.examples": 2, "eval.test_in_training": True,
    }  # fmt: skip
    return write_config(tiny_config(tiny_set, overrides), tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two workers that nobody disturbs."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    status, output = Job("train.py", "--config", str(config_file), "--run_dir", str(run), "--profile", "3").wait()
    assert status == 0, output
    assert "text to image" in output, "the table is printed"
    assert not lines_of_ray(output)
    return run


def same_losses(a: Path, b: Path) -> None:
    """Also: the samples behind the weights are those of the undisturbed run, each once."""
    first, second = losses(a), losses(b)
    assert list(first) == list(second) == list(range(1, STEPS + 1)), "every step exactly once"
    for step, value in first.items():
        assert second[step] == pytest.approx(value, rel=1e-4), step
    audit = audit_run(str(b))
    assert audit.sound and audit.steps == STEPS, audit
    seen, expected = (list(read_ledger(run, partial(plan_of, run))) for run in (RunDir(str(b)), RunDir(str(a))))
    assert seen == expected


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    lines = [r for r in records(undisturbed) if "loss" in r]
    assert set(lines[-1]) >= KEYS
    assert all(0 <= r["data_wait"] <= 1 and r["images_per_second"] > 0 for r in lines)
    assert lines[-1]["loss_rec"] < lines[0]["loss_rec"]
    assert [r["step"] for r in records(undisturbed) if "val_R@1" in r] == [30, 60, 90, 120]
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    names = {"R@1", "R@5", "R@10", "mAP", "mINP", "NDCG@10", "MRR"}
    assert metrics["split"] == "test" and set(metrics["initial"]) == set(metrics["refined"]) == names
    assert {"weight", "top_r", "tau", "chosen_on"} <= set(metrics["refinement"])
    assert metrics["refinement"]["chosen_on"] == "val"
    best = metrics["best_on_test"]
    assert best["chosen_on"] == "test" and best["step"] in (30, 60, 90, 120) and best["R@1"] >= metrics["initial"]["R@1"]
    assert [r["test_R@1"] for r in records(undisturbed) if r["step"] == metrics["checkpoint_step"] and "test_R@1" in r] == [
        pytest.approx(metrics["initial"]["R@1"], abs=0.01)
    ]
    assert all(low <= metrics["refined"][k] <= high for k, (low, high) in metrics["ci95"].items())
    assert metrics["n_queries"] > metrics["n_objects"] > 0 and metrics["images_per_second"] > 0
    assert "<html" in (undisturbed / "report.html").read_text()
    assert list((undisturbed / "tensorboard").iterdir())
    assert (undisturbed / "config.yaml").exists()
    assert 1 <= len(list((undisturbed / "checkpoints").glob("step-*"))) <= 3


def test_the_steps_that_were_asked_for_are_traced(undisturbed: Path) -> None:
    trace = json.loads(gzip.decompress((undisturbed / "profile" / "trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#10", "ProfilerStep#11", "ProfilerStep#12"}
    table = (undisturbed / "profile" / "operators.txt").read_text()
    assert table.startswith("3 steps after 10") and "aten::" in table
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["train"]["profile"] == 3


def test_evaluate_job_repeats_the_metrics(undisturbed: Path, tiny_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    argv = ["--checkpoint", str(undisturbed), "--data", str(tiny_set), "--split", "test", "--out", str(out)]
    status, output = Job("evaluate.py", *argv, "--no-report").wait()
    assert status == 0, output
    now, before = json.loads(out.read_text()), json.loads((undisturbed / "metrics.json").read_text())
    for part in ("initial", "refined", "ci95", "refinement", "by_caption_kind"):
        assert now[part] == before[part]


def test_references_of_one_set_refine_another(undisturbed: Path, tmp_path: Path) -> None:
    """Features, and what refines them, written out: the other set's captions and images, the run's references."""
    from support.tiny_set import TinySource, build_tiny_set

    from mmref.data.shard_set import ShardSet
    from mmref.evaluate.evaluation import open_run
    from mmref.evaluate.features import read_queries
    from mmref.evaluate.metrics import evaluate_features, summarize
    from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores
    from mmref.evaluate.split_features import Embedder, Portion
    from mmref.run.checkpoints import load_references

    other, out = build_tiny_set(tmp_path / "other", TinySource("other", first=1000)), tmp_path / "metrics.json"
    before = (undisturbed / "metrics.json").read_text()
    argv = ["--checkpoint", str(undisturbed), "--data", str(other), "--out", str(out)]
    status, output = Job("evaluate.py", *argv).wait()
    assert status == 0, output
    found = json.loads(out.read_text())
    assert found["data"] == "other" and (undisturbed / "report-other.html").exists()
    assert "best_on_test" in json.loads(before) and "best_on_test" not in found, "that is of the run's own test split"
    assert (undisturbed / "metrics.json").read_text() == before, "the run's own metrics stay"

    run, config, checkpoint = open_run(str(undisturbed))
    index = ShardSet.open(str(other)).index("test")
    queries, embed = read_queries(index), Embedder(run.path, checkpoint, config, str(other))

    def features(kind: str, count: int) -> np.ndarray:
        return embed.encode(Portion("test", kind, 0, count, queries.texts))[0]

    # a caption's words once for each object they describe: dense codes are centred on the mean of what is compared
    pairs, of = np.unique(np.stack([queries.text, queries.objects], 1), axis=0, return_inverse=True)
    image, text = features("image", len(index)), features("text", len(queries.texts))[pairs[:, 0]]
    references = load_references(run.inner(checkpoint.folder), checkpoint.meta).numpy()
    space = ReferenceSpace(references[np.abs(references).max((1, 2)) > 0])
    s = found["refinement"]
    settings = RefinementSettings(s["kind"], s["weight"], s["top_r"], s["tau"], s["top_p"])
    objects = np.asarray(index.object_row)
    refine = refined_scores(space, settings, text, image)
    for state, score_fn in (("initial", None), ("refined", refine)):
        ranked = evaluate_features(text, image, pairs[:, 1], objects, score_fn=score_fn)
        assert found[state] == pytest.approx(summarize(ranked, of.reshape(-1)), abs=0.01), state


def test_a_killed_worker_is_replaced(undisturbed: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job("train.py", "--config", str(config_file), "--run_dir", str(run))
    wait_for(lambda: any(r["step"] > EVERY + 5 for r in records(run)), job)
    victims = job.training_workers()
    assert len(victims) == 2
    victims[1].kill()
    status, output = job.wait()
    assert status == 0, output
    same_losses(undisturbed, run)


def test_a_killed_job_resumes_by_the_same_command(undisturbed: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train.py", "--config", str(config_file), "--run_dir", str(run))
    job = Job(*command)
    wait_for(lambda: any(r["step"] > 2 * EVERY + 5 for r in records(run)), job)
    job.kill()
    half = run / "checkpoints" / "step-00000099-torn"  # what a kill in the middle of writing leaves
    half.mkdir()
    (half / "meta.json").write_text('{"step": 99, "world": 2}')
    status, output = Job(*command).wait()
    assert status == 0, output
    assert f"resuming at step {2 * EVERY}" in output
    same_losses(undisturbed, run)


@pytest.mark.slow
def test_ctrl_c_loses_no_step(undisturbed: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ("train.py", "--config", str(config_file), "--run_dir", str(run))
    job = Job(*argv)
    wait_for(lambda: any(r["step"] > EVERY + 5 for r in records(run)), job)
    job.process.send_signal(signal.SIGINT)
    status, output = job.wait()
    assert status == 130 and "Ctrl-C: the workers finish their step" in output, output
    stopped = max(r["step"] for r in records(run))
    assert stopped % EVERY, "it came between two checkpoints"
    assert f"stopped on Ctrl-C after step {stopped}, which its checkpoint holds. The same command resumes it." in output
    status, output = Job(*argv).wait()
    assert status == 0 and f"resuming at step {stopped}" in output, output
    same_losses(undisturbed, run)


@pytest.mark.slow
def test_another_number_of_workers_and_stage_goes_on(undisturbed: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job("train.py", "--config", str(config_file), "--run_dir", str(run))
    wait_for(lambda: any(r["step"] > EVERY + 5 for r in records(run)), job)
    job.kill()
    flags = ("--train.workers", "1", "--train.zero_stage", "3", "--train.accumulation", "2")
    status, output = Job("train.py", "--config", str(config_file), "--run_dir", str(run), *flags).wait()
    assert status == 0, output
    same_losses(undisturbed, run)


def test_a_loss_that_is_not_finite_stops_the_run(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["--config", str(config_file), "--run_dir", str(run), "--train.lr", "1e30", "--train.clip_norm", "0"]
    status, output = Job("train.py", *argv, "--train.workers", "1").wait()
    assert status == 1
    assert "NonFiniteLossError" in output and "is not finite" in output
    offenders = json.loads((run / "nonfinite.json").read_text())
    assert len(offenders["image_ids"]) == 8
    assert not list(run.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_a_named_error_of_a_reader_ends_the_run_by_its_name(own_set: Path, tmp_path: Path) -> None:
    """It comes through Ray Data, from another process than the worker's, and the workers are not started again for it."""
    from support.tiny_set import damage_image, tiny_config

    from mmref.data.shard_set import ShardSet

    for image in range(len(ShardSet.open(str(own_set)).index("train"))):
        damage_image(own_set, image)
    overrides = {"train.max_steps": 12, "train.storage_gb": 0.2, "data.max_bad_fraction": 1.0}
    config = write_config(tiny_config(own_set, overrides), tmp_path)
    status, output = Job("train.py", "--config", str(config), "--run_dir", str(tmp_path / "run")).wait()
    assert status == 1
    assert "no usable image left" in output.strip().splitlines()[-1], output


@pytest.mark.parametrize("allowed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_broken_images(own_set: Path, tmp_path: Path, allowed: bool) -> None:
    from support.tiny_set import damage_image, tiny_config

    for image in (0, 4, 9):  # the first object has no other
        damage_image(own_set, image)
    overrides: dict[str, Any] = {
        "train.max_steps": 12, "train.eval_every": 6, "train.storage_gb": 0.2, "eval.bootstrap": 100,
        "data.max_bad_fraction": 0.2 if allowed else 0.001,
    }  # fmt: skip
    config: Config = tiny_config(own_set, overrides)
    run = tmp_path / "run"
    status, output = Job("train.py", "--config", str(write_config(config, tmp_path)), "--run_dir", str(run)).wait()
    if allowed:
        assert status == 0, output
        assert [r["bad_samples"] for r in records(run) if "bad_samples" in r][-1] > 0
        named = json.loads((run / "metrics.json").read_text())["bad_training_samples"]
        assert named and "train-00000" in named[0]
    else:
        assert status == 1
        assert "TooManyBadSamplesError" in output and "train-00000" in output and "max_bad_fraction" in output

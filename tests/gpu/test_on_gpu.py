"""What only a GPU can show: the same step as on a CPU, bf16, dropout's random state, memory, serving.

Skipped where there is no GPU. `MMREF_GPU_TESTS_ON=cpu` rehearses them there, as `benchmarks/gpu.sh --tiny` does.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.plain_training import AT, VARIANTS, PlainTraining, train
from support.tiny_run import make_run
from support.tiny_set import BERT, VIT

from mmref.losses.objective import TOTAL
from mmref.run.directory import RunDir
from mmref.sizing.peaks import peak_flops
from mmref.train.memory import out_of_memory
from mmref.train.profiler import WARM_UP, StepProfiler

DEVICE = torch.device(os.environ.get("MMREF_GPU_TESTS_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU here")]
CLOSE = {"atol": 2e-4, "rtol": 2e-3}  # fp32 on both: sums are added up in another order
DROPOUT: dict[str, Any] = {
    "model.vision_config": {**VIT, "hidden_dropout_prob": 0.3},
    "model.text_config": {**BERT, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
}


@pytest.fixture(autouse=True)
def plain_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions too multiply in fp32, and not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_the_same_as_on_a_cpu(make_config, variant):
    config = make_config(VARIANTS[variant])
    here, there = train(config, steps=2), train(config, steps=2, device=DEVICE)
    torch.testing.assert_close(there.losses, here.losses, **CLOSE)
    for a, b in zip(there.references, here.references, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(there.gradients, here.gradients, strict=True):
        largest = max(float(g.abs().max()) for g in b.values())
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=CLOSE["rtol"], atol=CLOSE["atol"] * max(1.0, largest))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bf16_is_finite_and_near_fp32(make_config, accumulation):
    changes = {"train.accumulation": accumulation, "loss.w_rec": 0.3}
    exact = train(make_config(changes), steps=3)
    half = train(make_config({**changes, "train.precision": "bf16", "train.gpu": ON_GPU}), steps=3, device=DEVICE)
    assert torch.isfinite(half.losses).all() and all(torch.isfinite(g).all() for step in half.gradients for g in step.values())
    torch.testing.assert_close(half.losses[:, AT[TOTAL]], exact.losses[:, AT[TOTAL]], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", ["moving average", "gradient, sampled negatives, lme, rec"])
def test_references_in_host_memory_are_those_on_the_device(make_config, variant):
    there, host = (
        train(make_config({**VARIANTS[variant], "reference.rows_on": place}), steps=3, device=DEVICE)
        for place in ("device", "host")
    )
    torch.testing.assert_close(host.references[-1], there.references[-1], **CLOSE)
    torch.testing.assert_close(host.losses, there.losses, **CLOSE)
    run = PlainTraining(make_config({"reference.rows_on": "host"}), device=DEVICE)
    assert run.bank.rows.device.type == "cpu" and run.references().device.type == DEVICE.type


def test_both_passes_of_gradient_caching_see_the_same_dropout(make_config):
    run = PlainTraining(make_config({**DROPOUT, "train.accumulation": 2}), device=DEVICE)
    seen = []

    def look(_: Any, given: Any, named: Any, out: Any) -> None:
        seen.append((given, named, out.image.detach(), out.text.detach()))

    run.model.register_forward_hook(look, with_kwargs=True)
    run.step(0)
    assert len(seen) == 4
    for first, second in ((0, 2), (1, 3)):
        for a, b in zip(seen[first][2:], seen[second][2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    run.model.eval()(*seen[0][0], **seen[0][1])
    assert not torch.allclose(seen[4][2], seen[0][2], atol=1e-2), "there was some"


def test_micro_batches_give_the_losses_of_the_whole_batch(make_config):
    whole, cut = (train(make_config({"train.accumulation": a, "loss.w_rec": 0.3}), steps=2, device=DEVICE) for a in (1, 4))
    torch.testing.assert_close(cut.losses, whole.losses, **CLOSE)


def test_features_and_search_results_are_those_of_a_cpu(tiny_set: Path, make_config, tmp_path, monkeypatch):
    pytest.importorskip("faiss", exc_type=ImportError)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from mmref.retrieval import index
    from mmref.retrieval.searcher import Searcher

    make_run(make_config(), str(tmp_path / "run"), {})
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "index"), split="test", workers=0)
    here, there = (Searcher(tmp_path / "index", device=device) for device in ("cpu", str(DEVICE)))
    assert next(there.model.module.parameters()).device.type == DEVICE.type
    sentences = ["a red circle", "a drawing of a blue square", "green star 3"]
    np.testing.assert_allclose(there.model.encode_text(sentences), here.model.encode_text(sentences), atol=1e-4)
    for a, b in zip(there.search_many(sentences, top=5), here.search_many(sentences, top=5), strict=True):
        np.testing.assert_allclose([r.score for r in a], [r.score for r in b], atol=1e-3)


def test_what_lay_in_memory_is_written_where_it_runs_out(make_config, tmp_path):
    run = RunDir(str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        if not ON_GPU:
            raise torch.OutOfMemoryError("rehearsed")
        torch.empty(1 << 46, dtype=torch.uint8, device=DEVICE)
    said = str(out_of_memory(raised.value, make_config(), run, 0))
    assert "has no memory left" in said and "`--train.accumulation 2`" in said
    if ON_GPU:
        assert torch.cuda.get_device_name(DEVICE) in said
        assert len(run.read_bytes("out_of_memory/rank-0.pickle")) > 0 and "Allocated memory" in run.read_text(
            "out_of_memory/rank-0.txt"
        )


def test_a_trace_has_kernels_and_allocations(tmp_path):
    run = RunDir(str(tmp_path))
    with StepProfiler(run, 2, DEVICE) as profiler:
        for _ in range(WARM_UP + 2):
            torch.ones(64, 64, device=DEVICE) @ torch.ones(64, 64, device=DEVICE)
            profiler.step()
    events = json.loads(gzip.decompress(run.read_bytes("profile/trace.json.gz")))["traceEvents"]
    assert any("mm" in event["name"] for event in events)
    assert ON_GPU == any(event.get("cat") == "kernel" for event in events) == run.exists("profile/memory.pickle")


def test_this_gpu_is_in_the_table_of_peaks():
    """A GPU that is not listed has no MFU in its log: a line in mmref/sizing/peaks.py gives it one."""
    if ON_GPU:
        assert peak_flops(torch.cuda.get_device_name(DEVICE), "fp32")

"""FLOPs of a pair as they are estimated, against those counted on a step of training as it runs; peaks by a GPU's name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.plain_training import PlainTraining
from support.tiny_set import BERT, CONVNEXT, VIT
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmref.config import Config
from mmref.model.flops import flop_counter
from mmref.sizing.estimate import compute_sizing, flops_of_a_pair, measure_model
from mmref.sizing.peaks import PEAKS, multiplied_in, peak_flops

# Wide enough that the products with the batch and the references are small beside the towers, as they are at a real size.
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SEEN = {**WIDE, "image_size": 16, "patch_size": 4}
READ = {**WIDE, "vocab_size": 80, "max_position_embeddings": 16}
BERT_WIDE, VIT_WIDE = {**BERT, **WIDE}, {**VIT, **SEEN}
MAPS = {**CONVNEXT, "hidden_sizes": [32, 64], "depths": [2, 2]}
FAMILIES = {
    "clip": {"model_type": "clip", "projection_dim": 16, "vision_config": SEEN, "text_config": {**READ, "eos_token_id": 2}},
    "siglip": {"model_type": "siglip", "vision_config": SEEN, "text_config": {**READ, "projection_size": 64}},
    "chinese_clip": {"model_type": "chinese_clip", "projection_dim": 16, "vision_config": SEEN, "text_config": READ},
    "dual encoder": {
        "model_type": "vision-text-dual-encoder", "projection_dim": 16, "vision_config": VIT_WIDE, "text_config": BERT_WIDE,
    },
}  # fmt: skip
TOWERS = {
    **{
        name: {"model.dual_config": config, "model.vision_config": None, "model.text_config": None}
        for name, config in FAMILIES.items()
    },
    "vit and bert": {"model.vision_config": VIT_WIDE, "model.text_config": BERT_WIDE},
    "convnext and bert": {"model.vision_config": MAPS, "model.text_config": BERT_WIDE},
}
CLOSE = {"rel": 0.03}


def counted(config: Config, tokens: int) -> int:
    """FLOPs of a step of StepRunner, all of whose captions have so many tokens."""
    run = PlainTraining(config)
    batch = run.reader.read_step(0)
    batch["mask"] = (np.arange(config.data.max_tokens) < tokens).astype(np.int32)[None].repeat(len(batch["ids"]), 0)
    with flop_counter() as counter:
        run.runner.run(0, run.runner.prepare(0, batch))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", TOWERS)
def test_a_pair_costs_what_is_counted_in_a_step(make_config, family):
    config = make_config(TOWERS[family])
    assert 8 * flops_of_a_pair(config, 10) == pytest.approx(counted(config, 10), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.lock_image": "all"},
        {"train.lock_text": "all"},
        {"train.lock_image": 1, "train.lock_text": 1},
        {"model.freeze_backbone": True, "model.adapter_layers": 1},
        {"loss.w_rec": 0.3},
        {"loss.w_id": 1.0, "loss.w_mlm": 1.0, "loss.mlm_layers": 1},
        {"train.gradient_checkpointing": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_frozen_has_no_gradients_and_heads_count(make_config, changes):
    """Recomputed activations do not: they are no part of what a step needs."""
    config = make_config(TOWERS["vit and bert"] | changes)
    needed = 8 * flops_of_a_pair(config, 10, objects=14)
    again = config.train.gradient_checkpointing
    plain = make_config(TOWERS["vit and bert"] | ({} if again else changes))
    assert needed == pytest.approx(counted(plain, 10), **CLOSE)
    assert not again or counted(config, 10) > 1.1 * needed


def test_frozen_towers_cost_less(make_config):
    whole, locked = (flops_of_a_pair(make_config(TOWERS["clip"] | c), 10) for c in ({}, {"train.lock_image": "all"}))
    assert locked < 0.7 * whole


def test_captions_cost_their_own_tokens(make_config):
    config = make_config(TOWERS["clip"])
    assert 8 * flops_of_a_pair(config, 4) == pytest.approx(counted(config, 4), **CLOSE)
    assert flops_of_a_pair(config, 4) < 0.9 * flops_of_a_pair(config, 10)


@pytest.mark.parametrize("heads", [{}, {"loss.w_rec": 0.3}], ids=["towers", "with reconstruction"])
def test_gradient_caching_computes_the_features_twice(make_config, heads):
    config = make_config(TOWERS["clip"] | heads | {"train.accumulation": 2})
    model = measure_model(config, config.micro_batch, 14)
    assert compute_sizing(config, 14, model).flops == pytest.approx(counted(config, 10), **CLOSE)
    assert flops_of_a_pair(config, 10) == flops_of_a_pair(make_config(TOWERS["clip"] | heads), 10), "of which one is needed"


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_alike_whether_it_is_fused_or_not(backend):
    """PyTorch's own counter passes over the fused kernel of a CPU."""
    query, key, value = (torch.randn(2, 4, tokens, 16, requires_grad=True) for tokens in (20, 12, 12))
    with sdpa_kernel(backend):
        with flop_counter() as counter:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 20 * 12 * 16)
        with counter:
            out.sum().backward()
    assert counter.get_total_flops() == 4 * (2 * 2 * 4 * 20 * 12 * 16)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", None, 8.1e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce GTX 1080 Ti", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name, bf16, fp32):
    assert (peak_flops(name, "bf16"), peak_flops(name, "fp32")) == (bf16, fp32)


def test_no_line_of_the_table_hides_another():
    for peak in PEAKS:
        assert peak_flops(" ".join(peak.words), "fp32") == peak.fp32 * 1e12


def test_tf32_counts_where_the_process_allows_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert (multiplied_in(True), multiplied_in(False)) == ("bf16", "fp32")
        torch.set_float32_matmul_precision("high")
        assert (multiplied_in(True), multiplied_in(False)) == ("bf16", "tf32")
    finally:
        torch.set_float32_matmul_precision(before)

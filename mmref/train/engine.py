"""The DeepSpeed engine: its config, parameter groups, learning rates, and its state by parameter name."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmref.config import Config, TrainConfig
from mmref.model.depth import depths, layers_of
from mmref.model.mmref import MMRef
from mmref.run.checkpoints import AVERAGE, MOMENTS
from mmref.storage.locations import cache_folder
from mmref.storage.locks import one_at_a_time
from mmref.train import collectives
from mmref.train.average import FollowWeights, keeps_average


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: MMRef, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: backbone and new modules, with and without weight decay; `lr_share` is the multiple of `train.lr`.

    Raises ModelError for `train.layer_decay` of a tower without layers.
    """
    shares = layer_shares(model, config.layer_decay)
    groups: dict[tuple[bool, bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ConvNeXt V2 has norms of shape (1, 1, 1, C).
            decays = parameter.squeeze().dim() > 1 and "position_embedding" not in name
            new = model.is_new(name)
            groups.setdefault((new, decays, config.lr_new if new else shares.get(name, 1.0)), []).append(parameter)
    return [
        {
            "params": groups[new, decays, share],
            "lr": config.lr,
            "lr_share": share,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for new, decays, share in sorted(groups)
    ]


def layer_shares(model: MMRef, decay: float) -> dict[str, float]:
    """Multiple of the learning rate of each parameter of the towers by its depth: 1 behind the last layer, and `decay` times
    the one after it for each layer; empty where all are alike. Raises ModelError."""
    shares: dict[str, float] = {}
    for name in ("vision_model", "text_model") if decay < 1 else ():
        tower, field = getattr(model.backbone, name), "train.layer_decay"
        if any(p.requires_grad for p in tower.parameters()):
            top = len(layers_of(tower, field)) + 1
            shares |= {f"backbone.{name}.{n}": decay ** (top - depth) for n, depth in depths(tower, field).items()}
    return shares


def deepspeed_config(config: Config, world: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own config for a run."""
    t = config.train
    # Buffers of this many elements are allocated at once; DeepSpeed refuses an odd number.
    bucket = min(int(5e7), max(parameters + parameters % 2, 2))
    zero: dict[str, Any] = {"stage": t.zero_stage, "reduce_bucket_size": bucket, "overlap_comm": t.on_gpu}
    if t.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if t.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": int(1e9),
            "stage3_param_persistence_threshold": 10_000,
        }
    return {
        "train_batch_size": t.global_batch,
        "train_micro_batch_size_per_gpu": t.global_batch // (world * t.accumulation),
        "gradient_accumulation_steps": t.accumulation,
        "gradient_clipping": t.clip_norm if t.zero_stage else 0.0,  # at stage 0 `clip` does it
        "zero_optimization": zero,
        "communication_data_type": t.gradient_dtype,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def prepare_node() -> None:
    """Build (or find) DeepSpeed's communication for CPUs, safely on this node; what follows in this process finds it loaded.

    The build needs ninja, which lies beside the interpreter and is not on PATH when a virtual environment is used
    without being activated. Each environment builds in a folder of its own: in a shared one, two would undo each other's
    build at every start. And torch's own lock, a file, would block every later start for ever once a process is killed that
    has it, in a build or in the seconds of loading: all of it is done under a lock that the kernel takes back.
    """
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + os.environ.get("PATH", "")
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:8]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", cache_folder(f"torch_extensions-{environment}")))
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        return  # NCCL is used instead
    from deepspeed.comm.torch import build_shm_op

    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / ".mmref.lock"):
        for left in folder.glob("**/lock"):
            left.unlink(missing_ok=True)
        build_shm_op()


def _running_statistics(model: torch.nn.Module) -> Iterator[Tensor]:
    """Means and variances that training keeps (BatchNorm); not those of frozen towers."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
            assert module.running_var is not None
            yield from (module.running_mean, module.running_var)


@torch.no_grad()
def average_statistics(model: torch.nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics (BatchNorm): what is scored is what is saved (collective)."""
    for statistic in _running_statistics(model):
        statistic.copy_(collectives.sum_over_ranks(statistic.clone()) / collectives.world_size())


def trained_tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """What training changes in a model, as far as this rank holds it: of a parameter that ZeRO-3 has partitioned its share."""
    parameters: Iterable[Any] = model.parameters()
    for p in parameters:
        if p.requires_grad and hasattr(p, "ds_tensor"):
            share = p.ds_tensor.detach().flatten()
            left = p.ds_numel - collectives.rank() * share.numel()
            yield share[: max(0, left)]  # the last rank's share is filled up, with whatever was there
        elif p.requires_grad:
            yield p.detach()
    yield from _running_statistics(model)


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether no number of some tensors is NaN or infinite: (), bool, on the device. Makes no copies of them."""
    extremes = [torch.stack(torch.aminmax(t)).float().to(device) for t in tensors if t.numel()]  # NaN is both
    return torch.isfinite(torch.cat(extremes)).all()


def build_engine(model: MMRef, config: Config, world: int) -> Any:
    """DeepSpeed engine around the model. The process group must exist (Ray Train makes it)."""
    if not config.train.on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    prepare_node()
    if config.train.compile:
        model.compile_towers()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train), betas=(0.9, config.train.beta2), eps=config.train.eps,
        fused=config.train.on_gpu or None,  # one kernel for all parameters of a group
    )  # fmt: skip
    if config.train.zero_stage == 0:
        optimizer.register_step_pre_hook(partial(clip, config.train.clip_norm))
    if config.train.ema:
        optimizer.register_step_post_hook(FollowWeights(config.train.ema))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, world, count),
        dist_init_required=False,
    )
    averages = config.train.ema > 0
    if (plain := _plain_optimizer(engine)) is None:
        _create_moments(engine, 0, averages)
    elif averages:
        for p in (p for p in model.parameters() if p.requires_grad):
            plain.state[p] = _fresh_state(p.detach(), 0, averages)
    return engine


def clip(max_norm: float, optimizer: Any, *_: Any) -> None:
    """Clip the gradients (0: no clipping) and leave their norm where the engine looks for it.

    DeepSpeed's own clipping at stage 0, where it wraps nothing around the optimizer, keeps no norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # The norm is summed in fp64 as at the other stages: over large tensors fp32 is off by some 1e-5.
    norms = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters])
    optimizer._global_grad_norm = torch.linalg.vector_norm(norms).float()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, optimizer._global_grad_norm)


def set_learning_rate(engine: Any, step: int, config: TrainConfig) -> float:
    """Set every group's rate for a step; returns the backbone's."""
    lr = learning_rate(step, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)
    return lr


# -- state by parameter name: independent of ZeRO stage and world size ---------------------------------------------


def iterate_state(engine: Any, wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, {"weight", "exp_avg", "exp_avg_sq"}) in full fp32 of the parameters this rank wants (collective); with `train.ema`
    also "ema", the average of the weight.

    Every rank takes part in the gathering of all parameters, one at a time. The tensors are copies: training does not
    change them. Frozen parameters have a weight only.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    plain = _plain_optimizer(engine)
    keys = (*MOMENTS, AVERAGE) if keeps_average(plain or engine.optimizer.optimizer) else MOMENTS
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                if wanted(name):
                    yield name, {"weight": _copy(p)}
        elif plain is not None:
            if wanted(name):
                state = plain.state.get(p, {})
                yield name, {"weight": _copy(p), **{k: _copy(state[k]) for k in keys if k in state}}
        else:
            moments = {k: safe_get_full_optimizer_state(p, k) for k in keys}
            weight = safe_get_full_fp32_param(p)
            if wanted(name):
                yield name, {"weight": weight, **moments}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def load_state(engine: Any, read: Any, updates: int) -> None:
    """Set weights and moments from `read(name) -> {"weight", ...}`, as saved by `iterate_state`.

    `updates` is the number of optimizer steps taken, for Adam's bias correction. What `read` has nothing of stays as it is. An
    average that it has none of begins at the weight.
    """
    from deepspeed.runtime.zero import GatheredParameters

    plain = _plain_optimizer(engine)
    averages = keeps_average(plain or engine.optimizer.optimizer)
    if plain is None:
        _create_moments(engine, updates, averages)
    for name, p in engine.module.named_parameters():
        saved = {k: v.to(p.device) for k, v in read(name).items()}
        if not saved:
            continue
        # With modifier_rank=0 the value of rank 0 is broadcast back to the partitions of the others.
        with GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
            p.data.copy_(saved["weight"].to(p.dtype))
        if not p.requires_grad:
            continue
        # A parameter that never had a gradient has no moments where DeepSpeed wraps nothing.
        state = _fresh_state(saved["weight"], updates, averages)
        state |= {k: saved[k].clone() for k in (*MOMENTS, AVERAGE) if k in saved and k in state}
        if plain is not None:
            plain.state[p] = state
            continue
        _set_shard(p, saved["weight"], None)
        for key in state.keys() - {"step"}:
            _set_shard(p, state[key], key)


def _fresh_state(weight: Tensor, updates: int, averages: bool) -> dict[str, Tensor]:
    """State of an optimizer that has seen no gradient, for a weight of any shape."""
    average = {AVERAGE: weight.clone()} if averages else {}
    step = torch.tensor(float(updates), device=weight.device)  # where a fused optimizer counts
    return {"step": step, **{k: torch.zeros_like(weight) for k in MOMENTS}, **average}


def _set_shard(p: Any, value: Tensor, key: str | None) -> None:
    """Set this rank's shard of a weight (`key` None) or of its optimizer state, from the whole value.

    At stage 3 a parameter's shards are of one size, the last filled up: DeepSpeed's own setting of a whole value reads beyond
    its end where it does not divide.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(p, "ds_tensor"):
        size, flat = p.ds_tensor.numel(), value.flatten()
        own = flat[collectives.rank() * size :][:size]
        value = torch.nn.functional.pad(own, (0, size - own.numel()))
        set_weight, set_state = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        set_weight, set_state = safe_set_full_fp32_param, safe_set_full_optimizer_state
    set_weight(p, value) if key is None else set_state(p, value, key)


def _plain_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer where DeepSpeed wraps nothing around it (stage 0 in fp32)."""
    return engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else None


def _flat_partitions(engine: Any) -> list[Tensor]:
    """This rank's flat fp32 partitions, the tensors that the wrapped optimizer updates."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise RuntimeError(f"unknown DeepSpeed optimizer {type(engine.optimizer).__name__}")


def _create_moments(engine: Any, updates: int, averages: bool) -> None:
    """Adam's state before the first step, zeros to be filled by name, and the weights as their own averages.

    DeepSpeed links parameters to their moments once, after the first step, and would miss a group that had none yet.
    """
    wrapped = engine.optimizer
    for flat in _flat_partitions(engine):
        wrapped.optimizer.state[flat] = _fresh_state(flat.detach(), updates, averages)
    if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2; stage 3 looks states up
        wrapped._hp_optimizer_states_linked = False
        wrapped._lazy_init_hp_params_optimizer_state()

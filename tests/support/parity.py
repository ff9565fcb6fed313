"""Ten steps of a tiny model inside DeepSpeed on some number of processes: losses, gradient norms and gradients.

`run(folder, config, world)` starts the processes; each reads its slice of the plan itself, so no Ray is needed.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmref.config import from_dict
from mmref.config.inputs import settled

STEPS = 10


def tiny(root: Path, **overrides: Any) -> dict[str, Any]:
    """A config of a tiny model on a tiny set, whose objects come back within ten steps.

    Overrides are dotted names with `__` for the dot.
    """
    values: dict[str, Any] = {
        "run_dir": "unused",
        "data": {"root": str(root), "image_height": 32, "image_width": 32, "max_tokens": 12},
        "model": {
            "vision_config": {
                "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 64, "patch_size": 8, "image_size": 32,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
            "text_config": {
                "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 64, "vocab_size": 4000, "max_position_embeddings": 32,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
            "embed_dim": 32, "pool": "mean",
        },
        "reference": {},
        "loss": {"w_rec": 0.3, "guide_from": 0.0, "guide_full": 0.2},
        "train": {"global_batch": 16, "max_steps": STEPS, "warmup_steps": 3, "lr": 1e-3},
    }  # fmt: skip
    for name, value in overrides.items():
        section, key = name.split("__")
        values[section][key] = value
    return values


def wide(root: Path, **overrides: Any) -> dict[str, Any]:
    """A config as `tiny`'s whose towers are wide enough for ZeRO-3 to partition them, on rectangular images."""
    values = tiny(root, data__image_height=48, data__image_width=24, model__embed_dim=128, **overrides)
    for tower in ("vision_config", "text_config"):
        values["model"][tower] |= {"hidden_size": 128, "intermediate_size": 256}
    return values


def _inputs(batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Pixels, ids and mask of the first samples of a batch, not augmented."""
    pixels = torch.from_numpy(batch["image"][:4].copy()).permute(0, 3, 1, 2).float() / 255
    return pixels, *(torch.from_numpy(batch[name][:4].copy()).long() for name in ("ids", "mask"))


def _process(rank: int, world: int, folder: str, values: dict[str, Any], stop_at: int, resume: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29512"), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90))
    from deepspeed.utils import safe_get_full_grad

    from mmref.data.reader import StepReader
    from mmref.model.mmref import build_model
    from mmref.train import checkpoint_files, collectives
    from mmref.train.average import averaged_weights
    from mmref.train.bank import ReferenceBank
    from mmref.train.division import Division
    from mmref.train.engine import build_engine, iterate_state, set_learning_rate
    from mmref.train.step import StepRunner

    config = settled(from_dict(values))
    reader = StepReader(config, rank, world)
    engine = build_engine(build_model(config, reader.tokens.vocab_size, reader.index.n_objects), config, world)
    bank = ReferenceBank(reader.index.n_objects, engine.module.embed_dim, config.reference, config.train.seed)
    division = Division.of(config, reader.index)
    start = 0
    if resume:
        meta = json.loads(Path(resume, "meta.json").read_text())
        checkpoint_files.load(resume, engine, bank, meta, division)
        start = meta["step"]
    gradients: dict[str, torch.Tensor] = {}

    def boundary() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, p in engine.module.named_parameters():
                grad = safe_get_full_grad(p) if p.requires_grad else None
                if grad is not None:
                    gradients[name] = grad.detach().clone()
        engine.step()

    runner = StepRunner(
        config, engine, lambda loss: engine.backward(loss, scale_wrt_gas=False), boundary, bank, reader.tokens,
        torch.device("cpu"), division,
    )  # fmt: skip
    losses, norms, first = [], [], None
    engine.train()
    for step in range(start, stop_at):
        set_learning_rate(engine, step, config.train)
        values_ = runner.run(step, runner.prepare(step, reader.read_step(step)))
        losses.append((collectives.sum_over_ranks(values_) / world).tolist())
        norms.append(float(engine.get_global_grad_norm()))
        first = first or dict(gradients)
    if stop_at < config.train.max_steps:
        checkpoint_files.save(f"{folder}/checkpoint", engine, bank, {"step": stop_at, "score": 0.0}, division)
    states = {name: {k: v.cpu().clone() for k, v in state.items()} for name, state in iterate_state(engine, lambda _: True)}
    averaged = None
    if config.train.ema:  # evaluated with the average, and with the weights again
        engine.eval()
        with averaged_weights(engine), torch.no_grad():
            averaged = engine(*_inputs(reader.read_step(0))).image
        with torch.no_grad():
            after = engine(*_inputs(reader.read_step(0))).image
    rows = collectives.gather(torch.nn.functional.pad(bank.rows, (0, 0, 0, 0, 0, bank.share - bank.count)))
    if rank == 0:
        torch.save(
            {
                "losses": losses,
                "norms": norms,
                "first": first,
                "last": gradients,
                "weights": {name: state["weight"] for name, state in states.items()},
                "states": states,
                "features": None if averaged is None else (averaged, after),
                "rows": rows[: bank.objects],
                "pairs": division and division.state_dict(),
                "compiled": engine.module.compiled,
                # those that ZeRO-3 keeps whole are below its threshold
                "partitioned": [n for n, p in engine.module.named_parameters() if not getattr(p, "ds_persist", True)],
            },
            f"{folder}/result.pt",
        )
    dist.barrier()
    os._exit(0)  # ZeRO-3 leaves threads of gloo behind that abort the interpreter when it ends in order


def run(folder: Path, values: dict[str, Any], world: int, stop_at: int = STEPS, resume: str = "") -> dict[str, Any]:
    """Result of rank 0: losses and gradient norm per step, gradients of the first and last step, final weights and reference
    rows."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_process, (world, str(folder), values, stop_at, resume), nprocs=world, start_method="spawn", join=True)
    return torch.load(folder / "result.pt", weights_only=True)

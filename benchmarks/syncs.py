"""Host syncs and copies from pageable memory of a training step, counted without a GPU.

    python benchmarks/syncs.py --out syncs.json

The step runs on a device that is made up: its tensors are wrappers around tensors of the CPU which say that they are
elsewhere, so a step takes the ways that it takes on a GPU, with the numbers of the CPU. Every operation passes by a counter.
It counts as a sync what a GPU's host must wait for: a number that is read (`item`, `if tensor`, a copy to the host), and a
result whose shape depends on values (`nonzero`, a mask as index, `unique`). It counts as a pageable copy what goes to the
device from memory that is not pinned, or that the host waits for.

Of each config a small model of the same architecture takes some steps on bundled data: the batch is made ready, the step
runs, gradients are clipped as at ZeRO stage 0, and losses and norms are added to what the next log line shows. What
DeepSpeed does on top is not counted, nor what a kernel of PyTorch does inside. Exits with 1 where anything is found.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from mmref.config import Config, load_config
from mmref.config.inputs import settled
from mmref.data.reader import StepReader
from mmref.model.mmref import build_model
from mmref.train import inputs
from mmref.train.bank import ReferenceBank
from mmref.train.engine import clip
from mmref.train.loop import Window
from mmref.train.step import StepRunner

DEVICE = torch.device("meta")  # the name that PyTorch lets tensors without a GPU have
aten = torch.ops.aten
READS = {  # their result, or its shape, is known to the host only after the device has come to them
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.bincount, aten.equal, aten.repeat_interleave,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}
MASKS = (torch.bool, torch.uint8)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the made-up device; `inner` is what it holds."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the counter")


class _MadeOfNumbers(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` makes a tensor of the host and copies it. For the name the device has here PyTorch
    would make one without numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


class SyncCounter(TorchDispatchMode):
    """As a context: runs what is asked of the made-up device, and counts what a GPU's host would wait for.

    `syncs` and `copies` are counted by operation and the line of this project that asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.pinned: set[int] = set()  # addresses of host memory that is pinned where there is a GPU
        self._numbers = _MadeOfNumbers()

    def __enter__(self) -> SyncCounter:
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        near = [x for x in tensors if isinstance(x, OnDevice)]
        to = kwargs.get("device")
        if not near and to != DEVICE:
            return func(*args, **kwargs)
        packet = func._overloadpacket
        self._count(packet, tensors, near, args, kwargs)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)
        if not near:  # made on the device, or copied to it
            return tree_map(_on_device, found)
        if packet in COPIES and ((to is not None and to != DEVICE) or not isinstance(args[0], OnDevice)):
            return args[0] if packet is aten.copy_ else found  # copied to the host
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_on_device, found))

    def _count(self, packet: Any, tensors: list[torch.Tensor], near: list[OnDevice], args: Any, kwargs: Any) -> None:
        far = [x for x in tensors if not isinstance(x, OnDevice)]
        if packet in COPIES:
            self._count_copy(packet, args, kwargs)
        elif packet in INDEXED:
            self.copies[_called(packet)] += sum(x.dim() > 0 for x in far)
            self.syncs[_called(packet)] += any(x is not None and x.dtype in MASKS for x in args[1])
        elif near and any(x.dim() > 0 for x in far):
            raise RuntimeError(f"{packet} of tensors on two devices, in {_called(packet)}")
        elif packet in READS and not (packet is aten.repeat_interleave and kwargs.get("output_size") is not None):
            self.syncs[_called(packet)] += 1

    def _count_copy(self, packet: Any, args: Any, kwargs: Any) -> None:
        source = args[1] if packet is aten.copy_ else args[0]
        target_near = isinstance(args[0], OnDevice) if packet is aten.copy_ else kwargs.get("device", source.device) == DEVICE
        waits = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
        if isinstance(source, OnDevice) and not target_near:
            self.syncs[_called(packet)] += 1
        elif not isinstance(source, OnDevice) and target_near:
            if packet is aten.copy_ and source.dim() == 0:
                return  # x[i] = 3.0: a number is an argument of the kernel
            self.copies[_called(packet)] += waits or source.untyped_storage().data_ptr() not in self.pinned

    def result(self) -> dict[str, Any]:
        """A row of the output."""
        syncs, copies = +self.syncs, +self.copies
        return {
            "sync_ops": syncs.total(), "pageable_copies": copies.total(),
            "where": {kind: dict(found) for kind, found in (("sync", syncs), ("copy", copies)) if found},
        }  # fmt: skip


def _on_device(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def _called(packet: Any) -> str:
    """An operation, and the innermost line of mmref that led to it."""
    frames = [f for f in traceback.extract_stack() if "/mmref/" in f.filename]
    at = f" in mmref/{frames[-1].filename.rpartition('/mmref/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{packet.__name__}{at}"


SET = "data_shards/emoji"
CLIP = {  # the architecture of openai/clip-vit-base-patch16
    "model_type": "clip", "projection_dim": 32,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": 4000, "max_position_embeddings": 77, "eos_token_id": 3, "bos_token_id": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 32, "patch_size": 8},
}  # fmt: skip
SMALL = {
    "model.dual": "", "model.dual_config": CLIP, "data.root": SET, "data.tokenizer": f"{SET}/tokenizer", "data.padding": "right",
    "data.image_height": 48, "data.image_width": 16, "data.image_mean": [0.5] * 3, "data.image_std": [0.3] * 3,
    "train.global_batch": 16, "train.precision": "fp32", "train.gpu": False, "train.max_steps": 20,
}  # fmt: skip
SAMPLED = {"reference.negatives": "sampled", "reference.sampled_negatives": 64, "loss.w_rec": 0.2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_vit_b16": ("clip_vit_b16", {}),
    "cuhk_pedes": ("cuhk_pedes", {}),
    "cuhk_pedes, sampled negatives, reconstruction": ("cuhk_pedes", SAMPLED),
    "cuhk_pedes, sampled negatives, reconstruction, two micro-batches": ("cuhk_pedes", {**SAMPLED, "train.accumulation": 2}),
    "irra": ("irra", {}),
    "clip_vit_b16, jitter, weighted captions, soft targets": (
        "clip_vit_b16",
        {"data.colour_jitter": 0.2, "loss.caption_weight": 2.0, "loss.guide_soft": 0.2, "reference.per_object": 2},
    ),
}  # fmt: skip
WARM, COUNTED = 2, 2  # steps: constants are copied to the device in the first


def small(name: str, overrides: dict[str, Any]) -> Config:
    """A config of configs/ with a small model on the bundled data; guidance is on."""
    fields = {**SMALL, "loss.guide_from": 0.0, "loss.guide_full": 0.0, **overrides}
    argv = ["--config", f"configs/{name}.yaml"]
    for field, value in fields.items():
        argv += [f"--{field}", value if isinstance(value, str) else json.dumps(value)]
    return settled(load_config(argv))


def count(config: Config) -> dict[str, Any]:
    """What is counted in COUNTED steps of a config, after WARM others."""
    reader, counter = StepReader(config), SyncCounter()
    host_memory = inputs.host_memory

    def pinned(size: int, device: torch.device) -> torch.Tensor:
        made = host_memory(size, torch.device("cpu"))
        counter.pinned.add(made.untyped_storage().data_ptr())
        return made

    objects = reader.index.n_objects
    model = build_model(config, reader.tokens.vocab_size, objects)
    with counter, mock.patch.object(inputs, "host_memory", pinned):
        model = model.to(DEVICE).train()
        bank = ReferenceBank(objects, model.embed_dim, config.reference, config.train.seed, DEVICE)
        runner = StepRunner(config, model, lambda loss: loss.backward(), lambda: None, bank, reader.tokens, DEVICE)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0)  # holds the parameters, and takes no step
        window = Window(DEVICE)
        for step in range(WARM + COUNTED):
            if step == WARM:
                counter.syncs.clear()
                counter.copies.clear()
            losses = runner.run(step, runner.prepare(step, reader.read_step(step)))
            clip(config.train.clip_norm, optimizer)
            window.add(step, losses, optimizer._global_grad_norm, runner.reference_norm)
            model.zero_grad()
    assert isinstance(window.losses, OnDevice)
    if not torch.isfinite(window.losses.inner).all():
        raise RuntimeError(f"the losses are not finite: {window.losses.inner.tolist()}")
    return counter.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    rows = [{"config": name, **count(small(*CONFIGS[name]))} for name in args.only]
    print(f"{'of ' + str(COUNTED) + ' steps':<68}{'syncs':>7}{'pageable copies':>17}")
    for row in rows:
        print(f"{row['config']:<68}{row['sync_ops']:>7}{row['pageable_copies']:>17}")
        for kind, found in row["where"].items():
            print(*(f"    {kind}: {times} x {what}" for what, times in found.items()), sep="\n")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"rows": rows}, file, indent=1)
    sys.exit(any(row["sync_ops"] or row["pageable_copies"] for row in rows))


if __name__ == "__main__":
    main()

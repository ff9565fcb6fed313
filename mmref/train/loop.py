"""The training loop of one worker."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from mmref.cluster.resources import torch_threads
from mmref.config import Config, check_batch, config_hash, from_dict
from mmref.config.packages import trust_own
from mmref.data.decode import calm_opencv
from mmref.data.plan import build_plan
from mmref.data.shard_set import ShardSet, train_index
from mmref.data.stream import Stream
from mmref.data.tokens import load_tokens
from mmref.errors import NonFiniteLossError, TooManyBadSamplesError
from mmref.evaluate.features import Encoder
from mmref.losses.objective import LOSSES, unpack
from mmref.model.mmref import build_model, chosen_precision
from mmref.run.directory import BAD_SAMPLES, RunDir
from mmref.run.models import start_of
from mmref.train import checkpoint_files, collectives
from mmref.train.ahead import Ahead
from mmref.train.average import averaged_weights
from mmref.train.bank import ReferenceBank
from mmref.train.division import Division
from mmref.train.elastic import accumulation_for
from mmref.train.engine import all_finite, average_statistics, build_engine, set_learning_rate, trained_tensors
from mmref.train.ledger import Ledger
from mmref.train.logs import RunLog
from mmref.train.memory import out_of_memory, peak_memory_gb
from mmref.train.profiler import StepProfiler
from mmref.train.saver import Saver
from mmref.train.sinks import Sinks, run_of
from mmref.train.speed import Speed
from mmref.train.step import StepRunner
from mmref.train.stop import StopNotice
from mmref.train.validation import Validation, score_of

AGREE_EVERY = 4  # steps on GPUs, which are short, between two agreements on whether to stop
# Each of these is checked in every step: what is said where it is not finite, and what helps.
CHECKED = (
    ("the loss of step {} is not finite", "Lower `train.lr`, or raise `loss.tau`."),
    (
        "the gradient of step {} is not finite (or its square is not), though its loss is",
        "Lower `train.lr`, try `train.precision` fp32, or look at a tower of your own for a derivative that is not finite, as "
        "that of a norm or square root of zeros.",
    ),
    (
        "the references' gradient of step {} is not finite (or its square is not), though its loss is",
        "Lower `reference.lr`, or raise `reference.tau`.",
    ),
)


def train_worker(values: dict[str, Any]) -> int:
    """Entry point on every Ray Train worker; `values` is the config as a plain dict.

    Returns 0 at the end of training, or the reason (mmref.train.stop) why the workers left before it, at a checkpoint.
    Raises the errors of mmref.errors, which end the run; others are failures that a restart of the workers may cure.
    """
    import ray.train

    config = from_dict(values)
    trust_own(config.model)
    run = RunDir(config.run_dir)
    try:
        return Worker(config, run).train()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, config, run, ray.train.get_context().get_world_rank()) from error


class Worker:
    """Everything one rank holds."""

    def __init__(self, config: Config, run: RunDir) -> None:
        import ray.train

        calm_opencv()
        context = ray.train.get_context()
        self.config, self.run = config, run
        self.world, self.rank = context.get_world_size(), context.get_world_rank()
        config.train.accumulation = accumulation_for(config, self.world)
        config.train.workers = self.world  # fewer than asked for where nodes were lost
        check_batch(config.train.global_batch, self.world, config.train.accumulation, config.train.images_per_object)
        if config.train.on_gpu:
            from ray.train.torch import get_device

            self.device = get_device()
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(torch_threads(config.train.threads, context.get_local_world_size()))

        self.run.check_shared("config.yaml")
        index = train_index(config)
        with checkpoint_files.resume_point(run, index.n_objects) as at:
            self.start, self.passed_over = at.step, at.passed_over
            # Ray Data's start-up takes seconds on busy cores: begin reading while the model is built.
            more = self.start < config.train.max_steps
            stream = Stream(config, self.rank, self.world, self.start) if more else iter(())
            self.tokens = load_tokens(config)
            shards = ShardSet.open(config.data.root)
            model = build_model(config, self.tokens.vocab_size, index.n_objects).to(self.device)
            self.images = len(index)
            self.speed = Speed(config, self.device, model.bf16, model.backbone.trims_texts, index.n_objects)
            self.engine = build_engine(model, config, self.world)
            self.bank = ReferenceBank(
                index.n_objects, model.embed_dim, config.reference, config.train.seed, self.device, index.object_ids
            )
            self.division = Division.of(config, index, self.device)
            if at.meta or not config.train.start_from:
                at.load(self.engine, self.bank, self.division)
            else:
                checkpoint_files.start_from(start_of(config, run), self.engine, self.bank)
        self.runner = StepRunner(
            config, self.engine, lambda loss: self.engine.backward(loss, scale_wrt_gas=False), self.engine.step,
            self.bank, self.tokens, self.device, self.division,
        )  # fmt: skip
        self.ahead = Ahead(stream, self.runner.prepare, self.start, config.train.max_steps)
        self.encoder = Encoder(self.engine, self.engine.module, config.data, self.tokens, self.device)
        self.validation = Validation(config) if "val" in shards.splits else None
        self.testing = Validation(config, "test") if config.eval.test_in_training and "test" in shards.splits else None
        share = config.train.global_batch // self.world
        own = range(self.rank * share, (self.rank + 1) * share)
        self.ledger = Ledger(run, self.start, own, self.device)
        self.notice = StopNotice(run, AGREE_EVERY if config.train.on_gpu else 1)
        self.bad: set[str] = set()  # since this start: shards may have been mended before it
        self.bad_before: set[str] = set()
        if self.start and run.exists(BAD_SAMPLES):
            self.bad_before = set(run.read_json(BAD_SAMPLES))
        elif not self.rank and run.exists(BAD_SAMPLES):  # of an attempt that this one does not go on from
            run.remove(BAD_SAMPLES)
        self.log: RunLog | None = None

    def train(self) -> int:
        """Steps from the last checkpoint to the end, or to where it is to stop (returns why), with log lines, evaluations
        and checkpoints."""
        config = self.config.train
        eval_every = config.steps_between_evaluations
        self.engine.train()
        reason = 0
        with (
            self._logging(),
            Saver(self.run, self.engine, self.bank, config.async_checkpoints, self.division) as saver,
            StepProfiler(self.run, 0 if self.rank else config.profile, self.device) as profiler,
        ):
            window, pace = Window(self.device), Pace(self.start, config.global_batch)
            for step, (batch, inputs) in enumerate(self.ahead, self.start):
                self.bad |= {line for b in batch["bad"].tolist() for line in b.split("\n") if line}
                if step == self.start and not self.rank:
                    began = time.perf_counter()
                    self.speed.learn(batch)
                    window.pause(time.perf_counter() - began)
                lr = set_learning_rate(self.engine, step, config)
                losses = self.runner.run(step, inputs)
                window.add(step, losses, self.engine.get_global_grad_norm(), self.runner.reference_norm)
                self.ledger.add(step, batch)
                profiler.step()
                done = step + 1
                if estimate := pace(done):
                    self._log(estimate, saver)
                reason = self.notice.agreed() if done < config.max_steps else 0
                evaluates = done % eval_every == 0 or done == config.max_steps
                logs = done % config.log_every == 0 or done == config.max_steps or reason > 0
                if logs or evaluates:
                    self._check(window)
                if logs:
                    self._log(self._line(done, lr, window), saver)
                    window = Window(self.device)
                    self.ahead.waited_s = 0.0
                if evaluates or reason:
                    began = time.perf_counter()
                    self._log(self._evaluate_and_save(done, saver, evaluate=evaluates), saver)
                    paused = time.perf_counter() - began
                    window.pause(paused)
                    pace.pause(paused)
                if reason:
                    break
            saver.wait()
            self._log(None, saver)
        self.ahead.close()
        self.notice.close()
        return reason

    def _line(self, done: int, lr: float, window: Window) -> dict[str, Any]:
        """One record of metrics.jsonl; every rank takes part in the means."""
        losses = unpack(collectives.sum_over_ranks(window.losses) / (self.world * window.steps))
        seconds = window.seconds()
        images = self.config.train.global_batch * window.steps / seconds
        record: dict[str, Any] = {"step": done, **losses}
        if self.config.loss.learn_tau:
            record["tau"] = 1 / float(self.runner.logits[0])
        if self.config.loss.align == "sigmoid":
            record["bias"] = float(self.runner.logits[1])
        if self.division is not None:
            record["clean_pairs"] = self.division.clean_share
        record |= {
            "lr": lr,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "images_per_second": images,
            "images_per_second_per_worker": images / self.world,
            **self.speed(images / self.world),
            "step_seconds": seconds / window.steps,
            "data_wait": self.ahead.waited_s / seconds,  # share of the time spent waiting for samples
            "memory_gb": peak_memory_gb(self.device),
            "bad_samples": len(self.bad | self.bad_before),
        }
        return record

    def _evaluate_and_save(self, done: int, saver: Saver, evaluate: bool) -> dict[str, Any]:
        """Score on val (and test, where asked for) where there is time for it, and begin a checkpoint; one record of
        metrics.jsonl (collective).

        A checkpoint that was not scored is never the best.
        """
        began = time.perf_counter()
        average_statistics(self.engine.module)
        self._check_weights(done)
        with averaged_weights(self.engine) if self.config.train.ema and evaluate else contextlib.nullcontext():
            metrics = self.validation(self.encoder, self.bank) if self.validation and evaluate else {}
            tested = self.testing(self.encoder, self.bank) if self.testing and evaluate else {}  # logged, decides nothing
        evaluated = time.perf_counter()
        score = score_of(metrics, self.config.eval.metric) if metrics else 0.0 if self.validation else float(done)
        meta = {
            "step": done,
            "score": score,
            "val": metrics,
            "config_hash": config_hash(self.config),
            "seed": self.config.train.seed,
        }
        named = {f"val_{k}": v for k, v in metrics.items()}
        scored = [one for one in (self.validation, self.testing) if one and evaluate]
        self.ledger.write(done)
        self._write_bad()
        blocked = saver.save(meta, {"step": done, "score": score, **named})
        tested = {f"test_{k}": v for k, v in tested.items()}
        return {
            "step": done,
            **named,
            **tested,
            "eval_seconds": evaluated - began,
            "eval_encode_seconds": sum(one.encode_seconds for one in scored),
            "eval_rank_seconds": sum(one.rank_seconds for one in scored),
            "checkpoint_blocking_seconds": blocked,
        }

    def _log(self, record: dict[str, Any] | None, saver: Saver) -> None:
        """Write a record, and those of the checkpoints committed meanwhile."""
        if self.log is None:
            return
        finished = saver.take_finished()
        for line in [*([record] if record else []), *finished]:
            self.log(line)
        # A run that goes on from a checkpoint is to find the lines before it: they are on their way while it is written.
        if finished or (record and "checkpoint_blocking_seconds" in record):
            self.log.upload()

    def _check(self, window: Window) -> None:
        """Raise, on every rank alike, for a loss or gradient that is not finite or too many broken samples."""
        first = collectives.gather(window.first_bad[None]).T  # (CHECKED, world)
        steps = first[first >= 0]
        if len(steps):
            step = int(steps.min())
            self._stop(step, *CHECKED[int((first == step).any(1).nonzero()[0])])
        names: list[Any] = [None] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(names, sorted(self.bad))
            self.bad = set().union(*names)
        allowed = self.config.data.max_bad_fraction * self.images
        if len(self.bad) > allowed:
            raise TooManyBadSamplesError(
                f"{len(self.bad)} of {self.images} training images are broken, more than data.max_bad_fraction "
                f"{self.config.data.max_bad_fraction} allows ({allowed:.1f}). First: {sorted(self.bad)[0].rstrip('.')}. "
                "Run `mmref shards verify` on the set, or raise data.max_bad_fraction."
            )

    def _check_weights(self, done: int) -> None:
        """Raise, on every rank alike, where what the last step made of the weights is not finite (collective).

        Its own loss and gradient were: a checkpoint would hold what no later step could learn from.
        """
        sound = all_finite([*trained_tensors(self.engine.module), self.bank.rows], self.device)
        if collectives.sum_over_ranks((~sound).float()[None]) > 0:
            what = "the update of step {} has left weights or references that are not finite"
            self._stop(done - 1, what, "Lower `train.lr`, and `reference.lr` where references learn by gradient.")

    def _stop(self, step: int, found: str, remedy: str) -> NoReturn:
        """Name the samples of a step in nonfinite.json and raise NonFiniteLossError (collective)."""
        index = train_index(self.config)
        images = self.ledger.images(step, build_plan(self.config, index))
        if not self.rank:
            image_ids = index.image_ids
            offenders = {"step": step, "image_ids": [image_ids[i] for i in images]}
            self.run.write_text("nonfinite.json", json.dumps(offenders, indent=1))
        collectives.gather_objects(None)  # the first that raises ends all workers: not before the file is there
        raise NonFiniteLossError(
            f"{found.format(step)}; training stopped and the last checkpoint is untouched. The ids of the step's samples are "
            f"in {self.run.join('nonfinite.json')}. {remedy}"
        )

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """`self.log` writes to metrics.jsonl and TensorBoard, on rank 0."""
        if self.rank:
            yield
            return
        sinks = Sinks(self.config.train.sinks, run_of(self.config, self.run, self.start)) if self.config.train.sinks else None
        self.log = RunLog(self.run, self.start, sinks)
        bf16, why = chosen_precision(self.config.train)
        self.log({
            "step": self.start, "started": time.time(), "workers": self.world, "passed_over": self.passed_over,
            "threads": None if self.config.train.on_gpu else torch.get_num_threads(),
            "precision": "bf16" if bf16 else "fp32", "precision_why": why,
        })  # fmt: skip
        try:
            yield
        finally:
            self._write_bad()
            self.log.close()

    def _write_bad(self) -> None:
        """The broken images that the run has met, for its report."""
        if not self.rank and (found := self.bad | self.bad_before):
            self.run.write_text(BAD_SAMPLES, json.dumps(sorted(found), indent=1))


class Pace:
    """Says once, a few steps after the start, how fast they were: until the first log line it may take minutes."""

    STEPS = 3

    def __init__(self, start: int, batch: int) -> None:
        self.start, self.batch, self.began = start, batch, 0.0
        self.paused_s = 0.0

    def __call__(self, done: int) -> dict[str, Any] | None:
        """A record of metrics.jsonl after STEPS steps behind the first, which warms up."""
        behind = done - self.start
        if behind == 1:
            self.began = time.perf_counter()
        if behind != 1 + self.STEPS:
            return None
        seconds = max(1e-9, time.perf_counter() - self.began - self.paused_s) / self.STEPS
        return {"step": done, "pace": self.batch / seconds, "pace_seconds": seconds}

    def pause(self, seconds: float) -> None:
        """Leave out what was no step."""
        self.paused_s += seconds


class Window:
    """Losses between two log lines, kept on the device: reading them is the only synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(len(LOSSES), device=device)
        # The first step at which each was not finite: (CHECKED,).
        self.first_bad = torch.full((len(CHECKED),), -1, dtype=torch.long, device=device)
        self.steps = 0
        self.paused_s = 0.0
        self.began = time.perf_counter()

    def add(self, step: int, losses: torch.Tensor, *norms: torch.Tensor | float) -> None:
        """Losses (LOSSES,) of a step and the norms of its gradients, of weights and references.

        DeepSpeed takes no step with a gradient that is not finite and says so by an infinite norm alone: the losses go on as
        if nothing was wrong.
        """
        self.losses += losses
        self.steps += 1
        # Adam keeps squares: after a norm whose square is infinite it would never learn again either.
        squares = [torch.as_tensor(norm, device=losses.device).square() for norm in norms]
        sizes = [losses.abs().sum(), *squares]
        bad = ~torch.isfinite(torch.stack(sizes)) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, torch.full_like(self.first_bad, step), self.first_bad)

    def pause(self, seconds: float) -> None:
        self.paused_s += seconds

    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.began - self.paused_s)

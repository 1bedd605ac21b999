"""The training loop: data -> loss -> gradients -> step, with everything that surrounds it.

Order of one step: batch, forward and backward, clip, judge, optimizer, average, log, evaluate,
save. One small reduction a step carries the loss, the wish to stop, whether a save failed and what
was counted, so all ranks decide alike. Random numbers are keyed by step, position and seed, never
by what ran before, so a checkpoint needs no generator state and a resumed run repeats the unbroken
one. What is of one kind of model is the task's (task.py). Left out: anything a recipe can express
by config; there are no callbacks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.config import UserError, config_hash
from carillon.engine.data.loader import state_of_all
from carillon.engine.data.order import stable_hash
from carillon.engine.data.positioned import B
from carillon.engine.log import Progress, Sink, cut_jsonl, logger
from carillon.engine.nn.fp8_layers import delayed_scaling, full_products
from carillon.engine.parallel.collectives import (
    clip_gradients_,
    gradient_norm,
    largest_over,
    sum_over,
    whole,
)
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.train.checkpoint import Checkpoint, CheckpointStore
from carillon.engine.train.checkpoint_reader import read_tensors
from carillon.engine.train.communication import CommunicationProbe
from carillon.engine.train.fp8_shadow import Fp8Shadow
from carillon.engine.train.guard import StepGuard, TrainingStopped
from carillon.engine.train.optim import NamedAdamW, WeightAverage, learning_rate
from carillon.engine.train.profile import GlobalWork, Throughput, Work, peak_flops
from carillon.engine.train.run_config import RunConfig
from carillon.engine.train.stop import StopAsked, StopRequest
from carillon.engine.train.task import Task

T = TypeVar("T")

# Called on the main rank once a checkpoint is complete, with the numbers of its step.
OnCheckpoint = Callable[[Checkpoint, Mapping[str, float]], None]


class Trainer(Generic[B]):
    """Owns the state of a run: optimizer, average, guard, and by its task model and loader."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        task: Task[B],
        *,
        path: Path,
        stop: StopRequest,
    ) -> None:
        self.config, self.world, self.path, self.task = config, world, path, task
        self.model, self.loader = task.model, task.loader
        self._sinks: list[Sink] = []
        self._stop = stop
        self._on_checkpoint: OnCheckpoint | None = None
        optimization = config.optimization
        self.optimizer = NamedAdamW(self.model, optimization, task.no_decay_names())
        decay = optimization.ema_decay
        self.average = WeightAverage(self.model, decay) if decay is not None else None
        self.guard = StepGuard(optimization.guard)
        self.fp8_scaling = delayed_scaling(self.model)
        self.shadow = Fp8Shadow(config.distributed.fp8_shadow)
        self.store = CheckpointStore(
            path / "checkpoints",
            keep_last=config.logging.keep_last,
            is_main=world.is_main,
            form=config.logging.checkpoint_form,
        )
        self._num_rows = self.loader.samples.data.num_training
        self.num_steps = optimization.num_steps(self._num_rows, config.data.batch_size)
        if optimization.warmup_steps > self.num_steps:
            raise UserError(
                f"optimization.warmup_steps: {optimization.warmup_steps} is more than the "
                f"{self.num_steps} steps that optimization.epochs makes of {self._num_rows:,} rows"
            )
        self.step = 0
        self.best: dict[int, float] = {}
        self._metric: float | None = None
        self._loss = math.nan  # of the newest step, over all ranks
        self._in_flight: int | None = None
        self._save_failed = False  # of any rank, as the newest step was told
        self._written: dict[str, float] = {}  # the newest of every metric
        self._latest: dict[str, float] = {}  # as they stood at the save in flight

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take everything from a verified checkpoint, whatever layout wrote it."""
        tensors = self._tensors()
        read_tensors(checkpoint, tensors, partial=False, shapes=self._shapes_of_all(tensors))
        state = checkpoint.state
        missing = {"loader", "joined", "guard", "best", "config_hash", "fp8_shadow"} - state.keys()
        if missing:
            raise UserError(
                f"checkpoint {checkpoint.path} has weights and no state of a training "
                f"({', '.join(sorted(missing))}): it comes from elsewhere; move that folder away"
            )
        self.step = int(state["step"])
        first = self.world.data_rank == 0  # on every process with its samples: copies are averaged
        counts = {} if first else dict.fromkeys(self.loader.counts(), 0)
        self.loader.load_state_dict(state["loader"] | counts)
        self.loader.samples.data.check_joined(state["joined"], self.loader.read_up_to)
        self.guard.load_state_dict(state["guard"])
        self.best = {int(step): float(metric) for step, metric in state["best"].items()}
        trained, asked = state["config_hash"], config_hash(self.config)
        if trained != asked:
            raise UserError(
                f"checkpoint {checkpoint.path} is of a run with other settings (config "
                f"{trained[:8]}, this is {asked[:8]}); move that folder away"
            )
        self.shadow.load_state_dict(state["fp8_shadow"])
        if self.fp8_scaling is not None:
            self.fp8_scaling.load_state_dict(state["fp8_scaling"])
        self.store.protect(set(self.best))

    def fit(self, sinks: list[Sink], on_checkpoint: OnCheckpoint) -> bool:
        """Train to the end; False when a signal asked to stop and the state was saved instead."""
        self._sinks, self._on_checkpoint = sinks, on_checkpoint
        if self.world.is_main:  # also at step 0: a kill before the first checkpoint leaves lines
            for name in ("sample_keys.jsonl", "skipped_steps.jsonl"):
                cut_jsonl(self.path / name, self.step)
        progress = Progress(self.num_steps, self.step) if self.world.is_main else None
        meter = None
        if self.world.is_main:
            stages = self.task.stage_imbalance()
            meter = Throughput(self._peak(), self.world.size, self.task.rate_name, stages)
        # Workers ignore SIGTERM, so any that an error left behind would hang the process's exit.
        with closing(iter(self.loader)) as batches:
            try:
                self._loop(batches, progress, meter)
                self._settle_save()
            except (TrainingStopped, UserError, OSError):
                self._settle_save()  # a save in flight is good, and needs the process group
                raise
            finally:
                if progress is not None:
                    progress.close()
                for sink in self._sinks:
                    sink.close()
        return self.step >= self.num_steps

    def _loop(
        self, batches: Iterator[B], progress: Progress | None, meter: Throughput | None
    ) -> None:
        started, first, stop = time.monotonic(), self.step, False
        while self.step < self.num_steps and not stop:
            self._metric = None  # of the step before, whose weights these no longer are
            waiting = time.perf_counter()
            batch = self._next(batches)
            waited_s = time.perf_counter() - waiting
            probe = CommunicationProbe(self.world.device) if self._due_probe() else None
            with probe or nullcontext():
                values, stop, work = self._train_step(batch)
            self.step += 1
            if meter is not None and progress is not None:
                rows = self.config.data.batch_size
                meter.add(rows=rows, work=work, waited_s=waited_s)
                if probe is not None:
                    meter.exclude(probe.overhead_s)
                written = self._due_log() or self.shadow.due(self.step) or probe is not None
                shown = values | meter.rates(self._communication(probe)) if written else None
                if shown is not None:
                    self._write(shown)
                speed_s = (time.monotonic() - started) / (self.step - first)
                progress.update(self.step, shown, speed_s * (self.num_steps - self.step))
            self.shadow.check()  # once what it saw is written
            aside = time.perf_counter()
            if self._save_failed:
                self._settle_save()  # raises why, on every rank
            if not stop:
                self._evaluate_if_due()
            if (stop and not self.guard.is_skipping) or self._due_save():
                self._save()
            if meter is not None:
                meter.exclude(time.perf_counter() - aside)

    def _next(self, batches: Iterator[B]) -> B:
        try:
            return next(batches)
        except UserError as error:
            if not self.world.is_main:  # this rank's alone, perhaps: no other would tell of it
                logger.error("%s", error)
            raise

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    def _due_save(self) -> bool:
        """Not while steps are being skipped: the weights may be what makes them bad."""
        if self.guard.is_skipping and self.step == self.num_steps:
            if not math.isfinite(self._loss):
                raise TrainingStopped(
                    f"the last step was skipped, its loss is {self._loss}; the last checkpoint is "
                    "from before it. Look at its samples in skipped_steps.jsonl, or train anew "
                    "with a lower optimization.lr"
                )
            return True
        return self._due(self.config.logging.checkpoint_interval_steps) and (
            not self.guard.is_skipping
        )

    def _due_log(self) -> bool:
        return self._due(self.config.logging.interval_steps)

    def _due_probe(self) -> bool:
        """Whether the next step is profiled: the main rank's, of several."""
        every = self.config.logging.communication_interval_steps
        alone = self.world.size == 1 or not self.world.is_main
        return bool(every) and not alone and (self.step + 1) % every == 0

    def _communication(self, probe: CommunicationProbe | None) -> float | None:
        if self.world.size == 1:
            return 0.0
        return probe.share if probe is not None else None

    def _peak(self) -> float:
        fp32 = self.config.distributed.precision == "fp32"  # fp8's MFU too is of the bf16 peak
        return peak_flops(self.world.device, torch.float32 if fp32 else torch.bfloat16)

    def _train_step(self, batch: B) -> tuple[dict[str, float], bool, GlobalWork]:
        self._report_batch(batch)
        work = self.task.work(batch)
        torch.manual_seed(stable_hash(self.config.experiment.seed, "step", self.step))
        local = self.loader.on_device()
        shadow = self._shadow_loss(local) if self.shadow.due(self.step + 1) else None
        loss = self.task.forward_backward(local)
        norm = self._clip()
        mean_loss, stop, counts, global_work = self._reduce(loss, work)
        self._loss = mean_loss
        rate = learning_rate(self.config.optimization, self.step, self.num_steps)
        verdict = self.guard.judge(mean_loss, norm)
        if verdict.skip:
            self._report_skip(batch, verdict.reason)
        else:
            if verdict.reason and self.world.is_main:
                logger.warning("step %d: %s", self.step + 1, verdict.reason)
            self.optimizer.step(rate)
        facts = self.task.end_step(skipped=verdict.skip)
        if not verdict.skip and self.average is not None:
            self.average.update(self.model)
        self.optimizer.zero_grad()
        if self.fp8_scaling is not None:
            largest = partial(largest_over, group=self.world.group)
            self.fp8_scaling.end_step(largest, counts=not verdict.skip)
        self.guard.check()
        self.loader.check_bad_share(**counts)
        values = {"loss": mean_loss, "lr": rate, "grad_norm": norm, "skipped": float(verdict.skip)}
        values["epoch"] = counts["num_read"] / self._num_rows
        values["bad_samples"] = float(counts["num_bad"])
        values["filtered_samples"] = float(counts["num_filtered"])
        epochs = self.loader.samples.data.epochs(counts["num_read"])
        values |= {f"epoch/{name}": epoch for name, epoch in epochs.items()}
        values |= facts
        if shadow is not None:
            values["fp8_gap"] = self.shadow.judge(mean_loss, shadow)
        return values, stop, global_work

    def _shadow_loss(self, batch: B) -> float:
        """Of the global batch and the weights before this step, by bfloat16 products."""
        with full_products(self.model):
            loss = self.task.loss_alone(batch)
        total = sum_over(loss.detach().double().reshape(1), self.world.group)
        return float(total) / self.world.size

    def _clip(self) -> float:
        limit = self.config.optimization.clip_norm or math.inf
        norm = gradient_norm(self.task.counted_parameters(), self._pipeline)
        clip_gradients_(self.model.parameters(), limit, norm)
        return float(norm)

    def _reduce(self, loss: Tensor, work: Work) -> tuple[float, bool, dict[str, int], GlobalWork]:
        """Mean loss, whether any rank was asked to stop, the loader's counts and the work of all
        ranks; takes down whether any rank's save failed."""
        counts, num_ranks = self.loader.counts(), self.world.degrees.data
        computed = [0.0] * num_ranks  # each writes its own place, so the sum is a list of all
        computed[self.world.data_rank] = work.computed
        told = [float(loss), float(self._stop.asked), float(self.store.has_failed)]
        own = [*told, *counts.values(), work.tokens, work.flops, *computed]
        values = torch.tensor(own, dtype=torch.float64, device=self.world.device)
        sum_of_losses, asked, failed, *sums = sum_over(values, self.world.group).tolist()
        self._save_failed = failed > 0
        copies = self.world.size // num_ranks  # processes with the same samples
        sums = [value / copies for value in sums]
        total = {name: int(value) for name, value in zip(counts, sums, strict=False)}
        tokens, flops, *of_ranks = sums[len(counts) :]
        work_of_all = GlobalWork(tokens, flops, of_ranks)
        return sum_of_losses / self.world.size, asked > 0, total, work_of_all

    def _report_batch(self, batch: B) -> None:
        for key, reason in batch.bad:
            logger.warning("step %d: bad sample %s replaced: %s", self.step + 1, key, reason)
        if self.config.logging.sample_keys:
            keys = self._gather(batch.keys)
            if self.world.is_main:
                line = {"step": self.step + 1, "keys": [key for part in keys for key in part]}
                with (self.path / "sample_keys.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def _report_skip(self, batch: B, reason: str | None) -> None:
        keys = [key for part in self._gather(batch.keys) for key in part]
        if not self.world.is_main:
            return
        line = {"step": self.step + 1, "reason": reason, "keys": keys}
        with (self.path / "skipped_steps.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        some = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        logger.warning("step %d skipped: %s; its samples: %s", self.step + 1, reason, some)

    def _gather(self, own: T) -> list[T]:
        """Of every data rank."""
        group = self.world.data_group
        if group is None:
            return [own]
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, own, group=group)
        return parts

    def _write(self, values: Mapping[str, float]) -> None:
        self._written = self._written | dict(values)
        for sink in self._sinks:
            sink.write(self.step, values)

    def _evaluate_if_due(self) -> None:
        every = self.config.evaluation.in_training.every
        if not every or not self._due(every) or self.guard.is_skipping:
            return
        weights = self._weights()
        if not self.world.is_main:  # the others go on and wait at the next collective
            return
        try:
            score = self.task.score(weights)
        except StopAsked:
            logger.info("the evaluation at step %d is left: a signal asked to stop", self.step)
            return
        if score is not None:
            self._metric = score.best
            self._write(score.metrics)
            logger.info("step %d  %s", self.step, score.told)

    def _weights(self) -> dict[str, Tensor]:
        """Whole plain tensors of what is evaluated, on the main rank: the average when one is
        kept."""
        source: Mapping[str, Tensor] = dict(self.model.named_parameters())
        if self.average is not None:
            source = self.average.tensors
        weights = {name: whole(value.detach()) for name, value in source.items()}
        weights |= self.task.buffers()
        return gather_named(weights, self._pipeline, to_all=False)

    @property
    def _pipeline(self) -> dist.ProcessGroup | None:
        """Processes that hold other stages; none without a pipeline."""
        mesh = self.world.axis("pp")
        return mesh.get_group() if mesh is not None else None

    def _shapes_of_all(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """Of the tensors of all stages: each process judges the checkpoint by the same."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self._pipeline is None:
            return shapes
        parts: list[Any] = [None] * dist.get_world_size(self._pipeline)
        dist.all_gather_object(parts, shapes, group=self._pipeline)
        return {name: shape for part in parts for name, shape in part.items()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"model.{name}": value for name, value in self.task.buffers().items()}
        moments = self.optimizer.state_tensors()
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.tensors.items()}
        if self.fp8_scaling is not None:
            scales = self.fp8_scaling.state_tensors()
            tensors |= {f"fp8.{name}": value for name, value in scales.items()}
        return tensors

    def _save(self) -> None:
        self._settle_save()
        self._rank_best()
        state = {
            "step": self.step,
            "metric": self._metric,
            "best": {str(step): metric for step, metric in self.best.items()},
            "loader": state_of_all(self._gather(self.loader.state_dict())),
            "joined": self.loader.samples.data.joined,
            "guard": self.guard.state_dict(),
            "fp8_shadow": self.shadow.state_dict(),
            "fp8_scaling": self.fp8_scaling and self.fp8_scaling.state_dict(),
            "config_hash": config_hash(self.config),
            "world_size": self.world.size,
        }
        self.store.save(self.step, self._tensors(), state)
        self._in_flight, self._latest = self.step, self._written

    def _settle_save(self) -> None:
        """Wait for the save in flight and announce it."""
        step, self._in_flight = self._in_flight, None
        self.store.wait()
        if step is not None and self.world.is_main:
            assert self._on_checkpoint is not None
            self._on_checkpoint(self.store.at(step), self._latest)

    def _rank_best(self) -> None:
        keep = self.config.logging.keep_best
        if self._metric is not None and keep:
            self.best[self.step] = self._metric
            ranked = sorted(self.best, key=lambda step: (-self.best[step], step))
            self.best = {step: self.best[step] for step in ranked[:keep]}
        self.store.protect(set(self.best))

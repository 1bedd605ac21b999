"""From a config to a finished run: the world, the folder, the parts, the loop, the closing lines.

What can be refused is refused before the process group starts: the config, the layout, the division
of the batch. Files are made by the main rank; its verdict, good or bad, reaches the others, so one
problem is one message and every process ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from carillon.engine.choices import divisors, either, listed, multiples
from carillon.engine.config import UserError, config_hash, to_values
from carillon.engine.data.pair_ids import check_field
from carillon.engine.data.tokenizer import Tokenizer, captions_of_all
from carillon.engine.data.training_data import TrainingData, language_weights, training_data
from carillon.engine.eval.report import draw_loss
from carillon.engine.eval.suite import check_in_training
from carillon.engine.log import Sink, configure_logging, logger, open_sinks
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.parallel.collectives import sum_over
from carillon.engine.parallel.determinism import fixed_order
from carillon.engine.parallel.mesh import World, degrees_of
from carillon.engine.parallel.pipeline_split import microbatch_problem
from carillon.engine.parallel.place import own_place
from carillon.engine.parallel.start import start_world, told_by_one
from carillon.engine.parallel.watchdog import Watchdog
from carillon.engine.registry.recorder import RunRecorder
from carillon.engine.train.checkpoint import Checkpoint, list_checkpoints
from carillon.engine.train.checkpoint_seal import recover
from carillon.engine.train.decoder_task import DecoderTask
from carillon.engine.train.dual_encoder_task import DualEncoderTask
from carillon.engine.train.guard import TrainingStopped
from carillon.engine.train.run import RunFolder, describe_run, git_commit
from carillon.engine.train.run_config import RunConfig, run_name
from carillon.engine.train.stop import StopRequest
from carillon.engine.train.task import Task
from carillon.engine.train.trainer import Trainer

EXIT_OK, EXIT_USER_ERROR, EXIT_STOPPED = 0, 2, 3
EXIT_REQUEUE = 75  # EX_TEMPFAIL: a signal asked to stop, the state is saved, start it again
T = TypeVar("T")


def train(config: RunConfig, *, fresh: bool = False) -> int:
    """Train the run of `config`, from its last checkpoint if there is one; gives an exit code."""
    # A worker group that torchrun restarts goes on; only its first start is fresh.
    fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with ExitStack() as kept:
        with told_by_one():
            place = own_place()
            configure_logging(place.rank)
            check_layout(config, place.size)
            kept.enter_context(fixed_order(config.distributed.deterministic))
        stop = kept.enter_context(StopRequest().listening())
        watchdog = kept.enter_context(Watchdog(config.distributed.watchdog_s))
        world = start_world(config.distributed, to_values(config))
        watchdog.join()
        return _train(config, world, fresh, stop)


def _train(config: RunConfig, world: World, fresh: bool, stop: StopRequest) -> int:
    try:
        # Before the run's folder is touched: `--fresh` must not move a good run aside for nothing.
        # The main rank goes first: it may have to index plain tars, which the others then find.
        on_main(world, lambda: _check_data(config), share=False)
        folder = on_main(world, lambda: RunFolder(config, fresh=fresh), share=False)
        path = Path(config.logging.output) / run_name(config)
        try:
            code = _train_in(config, world, path, folder, fresh, stop)
        finally:
            if folder is not None:
                folder.close()
        # They leave together: a launcher may end those that still work once the first has left.
        sum_over(torch.zeros(1, device=world.device), world.group).item()
        return code
    except TrainingStopped as reason:
        if world.is_main:
            logger.error("stopped: %s", reason)
        return EXIT_STOPPED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_data(config: RunConfig) -> None:
    data = training_data(config.data, config.experiment.seed)
    language_weights(config.data, data.sets)
    if isinstance(config.model, DecoderConfig):
        every = config.data.validation_every
        if config.evaluation.in_training.every and not any(data.validation_places()):
            raise UserError(
                f"data.validation_every: {every} holds out none of {data.num_training:,} rows, and "
                "evaluation.in_training.every asks for scores on them; use less, or every=0"
            )
        return
    check_in_training(config.evaluation, config.data)
    if config.loss.itc.same_field is not None:
        check_field([one.split for one in data.sets], config.loss.itc.same_field)


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raises UserError when the world cannot hold the config's degrees or batch."""
    data = degrees_of(config.distributed, world_size).data
    batch = config.data.batch_size
    if batch % data:
        near = listed(sorted(sorted(divisors(batch), key=lambda n: abs(n - data))[:3]))
        raise UserError(
            f"data.batch_size: {batch} do not divide over {data} data-parallel processes; "
            f"use {near} processes, or a batch of {either(multiples(data, batch))}"
        )
    equal = isinstance(config.model, DecoderConfig)  # routers' losses are means of microbatches
    problem = microbatch_problem(
        config.distributed, config.data.micro_batch_size, batch // data, equal=equal
    )
    if problem is not None:
        raise UserError(problem)


def on_main(world: World, work: Callable[[], T], *, share: bool = True) -> T | None:
    """Do `work` on the main rank only; if it fails every rank ends, and one tells why.

    Returns the result on every rank when it is shared, else on the main rank (None elsewhere).
    """
    if world.meshes is None:
        return work()
    result: T | None = None
    failure: Exception | None = None
    if world.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    code = 0 if failure is None else EXIT_USER_ERROR if isinstance(failure, UserError) else 1
    told: list[object] = [result if share else None, code]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] != 0:
        raise SystemExit(told[1])
    return told[0] if share else result  # type: ignore[return-value]


def _train_in(
    config: RunConfig,
    world: World,
    path: Path,
    folder: RunFolder | None,
    fresh: bool,
    stop: StopRequest,
) -> int:
    data, trainer = _prepare(config, world, path, folder, stop)
    if trainer.step >= trainer.num_steps:
        if world.is_main:
            logger.info("run %s is finished; train it anew with --fresh", path)
        return EXIT_OK

    def start_record() -> RunRecorder:
        return RunRecorder.start(
            config.logging.registry or path.parent / "registry.sqlite",
            sets=data.sets,
            name=path.name,
            config_hash=config_hash(config),
            params=to_values(config),
            artifacts_uri=path,
            git_commit=git_commit(),
            fresh=fresh,
        )

    recorder = on_main(world, start_record, share=False)
    status = "failed"
    try:
        finished = _fit(trainer, config, world, path, recorder)
        status = "finished" if finished else "interrupted"
    finally:
        if recorder is not None:
            recorder.finish(status)
    return EXIT_OK if finished else EXIT_REQUEUE


def _prepare(
    config: RunConfig, world: World, path: Path, folder: RunFolder | None, stop: StopRequest
) -> tuple[TrainingData, Trainer[Any]]:
    """The data and a trainer that stands where the run's last checkpoint left it."""
    data = training_data(config.data, config.experiment.seed)
    tokenizer = _tokenizer(config, world, path, data)

    def record() -> Checkpoint | None:
        if folder is not None:
            folder.record(describe_run(config, data, tokenizer))
        recover(path / "checkpoints")
        found = list_checkpoints(path / "checkpoints")
        if found:
            found[-1].verify()
        return found[-1] if found else None

    checkpoint = on_main(world, record)
    task = _task(config, world, data, tokenizer, stop)
    trainer = Trainer(config, world, task, path=path, stop=stop)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return data, trainer


def _task(
    config: RunConfig, world: World, data: TrainingData, tokenizer: Tokenizer, stop: StopRequest
) -> Task[Any]:
    kind = DecoderTask if isinstance(config.model, DecoderConfig) else DualEncoderTask
    return kind(config, world, data, tokenizer, before_batch=stop.check)


def _fit(
    trainer: Trainer[Any], config: RunConfig, world: World, path: Path, recorder: RunRecorder | None
) -> bool:
    sinks: list[Sink] = []

    def record_checkpoint(checkpoint: Checkpoint, metrics: Mapping[str, float]) -> None:
        if recorder is not None:
            recorder.checkpoint(
                checkpoint.step,
                uri=checkpoint.path,
                content_hash=checkpoint.content_hash,
                val_metrics=metrics,
            )
            recorder.progress(checkpoint.step, metrics)

    if world.is_main:
        at = f"resumes at step {trainer.step} of" if trainer.step else "trains for"
        logger.info("run %s %s %d steps on %d process(es)", path, at, trainer.num_steps, world.size)
        sinks = open_sinks(config.logging, path, trainer.step, to_values(config))
    finished = trainer.fit(sinks, on_checkpoint=record_checkpoint)
    if world.is_main:
        _draw_loss(path)
        if finished:
            scored = f"; score it with: carillon eval run {path}"
            logger.info("run %s is done%s", path, scored if trainer.task.has_evaluation else "")
        elif trainer.guard.is_skipping:
            logger.warning(
                "stopped at step %d while steps were being skipped, which is not saved; the same "
                "command resumes from the last checkpoint",
                trainer.step,
            )
        else:
            logger.info("stopped at step %d, saved; the same command resumes it", trainer.step)
    return finished


def _draw_loss(path: Path) -> None:
    """A picture is worth no exit code: what keeps it from being drawn is only told."""
    try:
        draw_loss(path / "metrics.jsonl", path / "loss.png")
    except (UserError, OSError) as error:
        logger.warning("loss.png was not drawn: %s", error)


def _tokenizer(config: RunConfig, world: World, path: Path, data: TrainingData) -> Tokenizer:
    """The run's own copy, from the config's file or trained on the training captions."""

    def prepare() -> None:
        own, wanted = path / "tokenizer.json", config.data.tokenizer
        if own.is_file():
            if wanted.path is not None and Path(wanted.path).exists():
                _same_tokenizer(path, Tokenizer.load(wanted.path), Tokenizer.load(own))
            return
        if wanted.path is not None:
            tokenizer = Tokenizer.load(wanted.path)
        else:
            logger.info("training a tokenizer of %d entries on the captions", wanted.vocab_size)
            captions = captions_of_all(
                [one.split for one in data.sets],
                wanted.max_captions,
                config.data.filters.lang_allow,
            )
            tokenizer = Tokenizer.train(captions, vocab_size=wanted.vocab_size)
        temporary = own.with_suffix(".tmp")
        tokenizer.save(temporary)
        temporary.replace(own)

    on_main(world, prepare, share=False)
    return Tokenizer.load(path / "tokenizer.json")


def _same_tokenizer(run: Path, given: Tokenizer, own: Tokenizer) -> None:
    """A file that has changed under its path would be another run; one that is gone would not."""
    if given.fingerprint != own.fingerprint:
        raise UserError(
            f"data.tokenizer.path: the file is not the one that run {run} was trained with "
            f"(fingerprint {given.fingerprint[:12]}, the run has {own.fingerprint[:12]}); "
            "restore it, or start anew with --fresh"
        )

"""Where numbers and messages go: console, metrics.jsonl, TensorBoard, and W&B or MLflow when asked.

Only the main rank has sinks. A sink gets a step and a flat dict of numbers; a sink that was asked
for and is not installed raises at the start, not after an hour. metrics.jsonl is the record that
plots and resumed runs read; on resume, lines past the checkpoint are cut, since they will be made
again.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from carillon.engine.config import UserError, section, setting

logger = logging.getLogger("carillon")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """`logging.wandb`."""

    project: str | None = setting(None, "W&B project; none: no W&B.")
    tags: tuple[str, ...] = setting((), "W&B tags.")


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """`logging.mlflow`."""

    experiment: str | None = setting(None, "MLflow experiment; none: no MLflow.")
    tracking_uri: str | None = setting(None, "MLflow server or folder; none: MLflow's default.")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """`logging`: what is written, where and how often. Never changes the result."""

    output: str = setting("runs", "Folder of the run folders.")
    registry: str | None = setting(
        None, "Registry database: a file or URL; none: registry.sqlite in output."
    )
    interval_steps: int = setting(10, "Steps between log lines.", min=1)
    communication_interval_steps: int = setting(
        0, "Steps between two that are profiled for communication_share; 0: none.", min=0
    )
    checkpoint_interval_steps: int = setting(500, "Steps between checkpoints.", min=1)
    checkpoint_form: Literal["dcp", "safetensors", "zarr"] = setting(
        "dcp", "Files of checkpoints; a run resumes from any. Anything but dcp holds whole tensors."
    )
    keep_last: int = setting(2, "Newest checkpoints kept.", min=1)
    keep_best: int = setting(
        1, "Best checkpoints kept, of the steps that were both evaluated and saved.", min=0
    )
    sample_keys: bool = setting(False, "Write the keys of every batch to sample_keys.jsonl.")
    tensorboard: bool = setting(True, "Write TensorBoard events.")
    wandb: WandbConfig = section(WandbConfig)
    mlflow: MlflowConfig = section(MlflowConfig)

    def check(self) -> Iterator[str]:
        for name, key, wanted in (
            ("wandb", "project", self.wandb.project),
            ("mlflow", "experiment", self.mlflow.experiment),
        ):
            if wanted is not None and importlib.util.find_spec(name) is None:
                yield (
                    f"{name}: it is not installed; pip install {name}, or set "
                    f"logging.{name}.{key}=null"
                )


def configure_logging(rank: int) -> None:
    """Messages of the main rank on stderr; of the others only warnings, with their rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # A hint on the order of reductions, for those who write layouts: nothing that a user can do.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line; cut back to `from_step` when a run resumes."""

    def __init__(self, path: Path, from_step: int) -> None:
        cut_jsonl(path, from_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity: null stands for both.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_jsonl(path: Path, from_step: int) -> None:
    """Drop lines of steps after `from_step`, and lines that a kill or a power cut damaged."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= from_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None when it is not one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoardSink:
    def __init__(self, folder: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = from_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, config: WandbConfig, run_path: Path, params: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            tags=list(config.tags),
            name=run_path.name,
            id=run_path.name,
            dir=str(run_path),
            resume="allow",
            config=dict(params),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    def __init__(self, config: MlflowConfig, run_path: Path) -> None:
        import mlflow

        begun = run_path / "mlflow_run_id"  # a resumed run goes on in the one that it began
        run_id = begun.read_text().strip() if begun.exists() else None
        try:
            if config.tracking_uri is not None:
                mlflow.set_tracking_uri(config.tracking_uri)
            mlflow.set_experiment(config.experiment)
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else run_path.name)
        except mlflow.exceptions.MlflowException as error:
            forget = f", or remove {begun} to begin another run there" if run_id else ""
            raise UserError(
                f"logging.mlflow: {error}. Correct tracking_uri or experiment, set "
                f"logging.mlflow.experiment=null{forget}"
            ) from None
        begun.write_text(run.info.run_id + "\n")
        self._mlflow = mlflow

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def open_sinks(
    config: LoggingConfig, run_path: Path, from_step: int, params: Mapping[str, Any]
) -> list[Sink]:
    """The sinks that the config asks for; metrics.jsonl always."""
    sinks: list[Sink] = []
    if config.mlflow.experiment is not None:  # services first: they may refuse
        sinks.append(MlflowSink(config.mlflow, run_path))
    if config.wandb.project is not None:
        sinks.append(WandbSink(config.wandb, run_path, params))
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_path / "tensorboard", from_step))
    return [JsonlSink(run_path / "metrics.jsonl", from_step), *sinks]


class Progress:
    """A progress bar on a terminal, a line per log interval elsewhere."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._num_steps = num_steps
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=num_steps, completed=first_step)
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float] | None, left_s: float | None) -> None:
        """Move to `step`; with `values`, show them (`left_s`: seconds to the end)."""
        text = _describe(values) if values else None
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif text:
            left = f"  left {left_s / 60:.1f} min" if left_s is not None else ""
            logger.info("step %d/%d  %s%s", step, self._num_steps, text, left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _describe(values: Mapping[str, float]) -> str:
    rate = next(name for name in values if name.endswith("_per_s"))
    return (
        f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values[rate]:.0f} "
        f"{rate.removesuffix('_per_s')}/s  MFU {100 * values['mfu']:.1f}%"
    )

"""What a kind of model adds to the training loop: its batches, its loss, its work and its score.

The loop (trainer.py) owns the order of a step, the optimizer, the guard, checkpoints and logs, and
is the same for every kind. A task owns the model as it is laid out and the loader that feeds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.positioned import B
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World
from carillon.engine.train.profile import Work


class Score(NamedTuple):
    """What an evaluation in training gave; `best` is what keep-best compares, higher is better."""

    metrics: dict[str, float]
    best: float | None
    told: str


class Task(Protocol[B]):
    """One kind of model in training. Every method is called on every process alike."""

    rate_name: str  # the metric that says how many of what a batch counts are done in a second
    has_evaluation: bool  # whether `carillon eval run` scores the run

    @property
    def model(self) -> nn.Module: ...

    @property
    def loader(self) -> TrainingLoader[B]: ...

    def stage_imbalance(self) -> float:
        """Of a pipeline: the busiest process's share of the work over an even one; else 1."""
        ...

    def no_decay_names(self) -> frozenset[str]:
        """Parameters without weight decay."""
        ...

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Those whose gradients are in the norm: of copies on pipeline stages only one."""
        ...

    def buffers(self) -> dict[str, Tensor]:
        """State that no gradient moves, by the whole model's names; saved with the weights."""
        ...

    def work(self, batch: B) -> Work:
        """What a step on this process's share takes; called while the batch is on the host."""
        ...

    def forward_backward(self, batch: B) -> Tensor:
        """Add the gradients of this process's share; returns its loss, a detached scalar. The mean
        of the losses over all processes is the loss of the global batch."""
        ...

    def loss_alone(self, batch: B) -> Tensor:
        """The same loss and nothing else."""
        ...

    def end_step(self, *, skipped: bool) -> dict[str, float]:
        """After the optimizer's step, or instead of it; returns what to log beside the loss."""
        ...

    def evaluate(self, weights: Mapping[str, Tensor]) -> Score | None:
        """Score the whole weights, which the main rank has; none on the others. Raises StopAsked
        where a signal asked to stop."""
        ...


def autocast_of(layout: DistributedConfig, world: World) -> AbstractContextManager[None]:
    """The arithmetic of a forward pass."""
    if layout.precision == "fp32":
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16)

"""What a kind of model adds to the training loop: its batches, its loss, its work and its score.

The loop (trainer.py) owns the order of a step, the optimizer, the guard, checkpoints and logs, and
is the same for every kind. A task owns the model as it is laid out and the loader that feeds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Generic, NamedTuple

import torch
from torch import Tensor, nn

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.positioned import B, Positioned
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.train.profile import Work
from carillon.engine.train.run_config import RunConfig


class Score(NamedTuple):
    """What an evaluation in training gave; `best` is what keep-best compares, higher is better."""

    metrics: dict[str, float]
    best: float | None
    told: str


class Task(ABC, Generic[B]):
    """One kind of model in training. Every method is called on every process alike."""

    rate_name: ClassVar[str]  # the metric of how many of what a batch counts are done in a second
    has_evaluation: ClassVar[bool]  # whether `carillon eval run` scores the run

    def __init__(
        self,
        config: RunConfig,
        world: World,
        tokenizer: Tokenizer,
        samples: Positioned[B],
        before_batch: Callable[[], None],
    ) -> None:
        """`before_batch` is called before each batch of an evaluation, and may end it by raising
        StopAsked."""
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.before_batch = before_batch
        self.loader = TrainingLoader(
            samples, rank=world.data_rank, world_size=world.degrees.data, device=world.device
        )

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """As it is laid out."""

    @abstractmethod
    def stage_imbalance(self) -> float:
        """Of a pipeline: the busiest process's share of the work over an even one; else 1."""

    @abstractmethod
    def no_decay_names(self) -> frozenset[str]:
        """Parameters without weight decay."""

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Those whose gradients are in the norm: of copies on pipeline stages only one."""
        return self.model.parameters()

    def buffers(self) -> dict[str, Tensor]:
        """State that no gradient moves, by the whole model's names; saved with the weights."""
        return {}

    @abstractmethod
    def work(self, batch: B) -> Work:
        """What a step on this process's share takes; called while the batch is on the host."""

    @abstractmethod
    def forward_backward(self, batch: B) -> Tensor:
        """Add the gradients of this process's share; returns its loss, a detached scalar. The mean
        of the losses over all processes is the loss of the global batch."""

    @abstractmethod
    def loss_alone(self, batch: B) -> Tensor:
        """The same loss and nothing else."""

    @abstractmethod
    def end_step(self, *, skipped: bool) -> dict[str, float]:
        """After the optimizer's step, or instead of it; returns what to log beside the loss."""

    @abstractmethod
    def score(self, weights: Mapping[str, Tensor]) -> Score | None:
        """Of the whole weights, on the main process, which alone has them; none where nothing is
        held out. Raises StopAsked where a signal asked to stop."""

    def microbatch_size(self, share: int) -> int:
        """Pairs or rows of a microbatch, of so many that a process has."""
        config = self.config
        return microbatch_size(config.distributed, config.data.micro_batch_size, share)

    def autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of a forward pass."""
        if self.config.distributed.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

"""Pipeline parallelism: stages on the processes of one mesh axis, run by torch's own schedules.

A `Pipeline` runs a chain of modules, each on the process that holds it. Its two passes are a
forward one without a graph and a step of forward and backward passes; both cut a batch into equal
microbatches. What travels between stages has one shape, known beforehand, so nothing is negotiated;
another length makes another schedule, and the newest few are kept. Schedules never scale gradients:
the losses of the microbatches must add up to the loss. Left out: a scheduler of our own, and stages
that pass on more than one tensor.
Status: runs on CPU with gloo; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline_split import (
    is_looped,
    num_stages,
    rank_of_last_stage,
    stages_of,
)

_SCHEDULES: Mapping[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
_KEPT = 8  # schedules; each holds what arrives for all microbatches of a step

Loss = Callable[[Tensor, Tensor], Tensor]


class Shapes(NamedTuple):
    """Of one microbatch: what the first stage takes, what travels, what the last stage gives."""

    first: tuple[int, ...]
    between: tuple[int, ...]
    last: tuple[int, ...]
    dtype: torch.dtype  # of what the first stage takes; the others are fp32


class Pipeline:
    """A chain of modules over a process group; this process has those of `stages_of`."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        config: DistributedConfig,
        group: dist.ProcessGroup,
        *,
        device: torch.device,
        loss: Loss,
    ) -> None:
        self.modules, self.group, self.device = modules, group, device
        self._config, self._loss = config, loss
        self._stages = stages_of(config, dist.get_rank(group))
        self.rank_of_last = rank_of_last_stage(config)
        self.has_first = self._stages[0] == 0
        self.has_last = dist.get_rank(group) == self.rank_of_last
        self._schedule = lru_cache(_KEPT)(self._make_schedule)

    def forward(
        self, batch: Tensor, extras: Mapping[str, Tensor], shapes: Shapes, num_microbatches: int
    ) -> Tensor | None:
        """The output of the last stage, without a graph; none on processes without it.

        `batch` goes to the first stage, the `extras` by name to every one; both are given whole.
        """
        with torch.no_grad():
            if self._config.pp_schedule == "zbv":
                return self._forward_in_v(batch, extras, shapes, num_microbatches)
            schedule, stages = self._schedule(shapes, num_microbatches, backward=False)
            output: Tensor | None = schedule.eval(*self._inputs(batch), **extras)
        _let_go(stages)
        return output

    def _forward_in_v(
        self, batch: Tensor, extras: Mapping[str, Tensor], shapes: Shapes, num_microbatches: int
    ) -> Tensor | None:
        """What `eval` of torch's schedule would be: it fails where a stage's next one is local
        (torch 2.13: "can't steal_bwd_input").

        All microbatches go down the V, then all up, so both ends of a pair of processes send and
        receive in one order, which NCCL needs.
        """
        rank, size = dist.get_rank(self.group), self._config.pp
        values = list(batch.chunk(num_microbatches))
        named = [
            {name: value.chunk(num_microbatches)[i] for name, value in extras.items()}
            for i in range(num_microbatches)
        ]
        sent: list[tuple[dist.Work | None, Tensor]] = []  # a tensor must live until it has gone
        for index, module in zip(self._stages, self.modules, strict=True):
            came, goes = (rank + 1, rank - 1) if index >= size else (rank - 1, rank + 1)
            for i in range(num_microbatches):
                if index not in (0, size):  # the two stages at the V's tip are one process's
                    values[i] = torch.empty(shapes.between, device=self.device)
                    dist.recv(
                        values[i], src=dist.get_global_rank(self.group, came), group=self.group
                    )
                values[i] = module(values[i], **named[i])
                if index not in (size - 1, 2 * size - 1):
                    destination = dist.get_global_rank(self.group, goes)
                    sent.append(
                        (dist.isend(values[i], dst=destination, group=self.group), values[i])
                    )
        for work, _ in sent:
            if work is not None:
                work.wait()
        return torch.cat(values) if self.has_last else None

    def step(
        self,
        batch: Tensor,
        extras: Mapping[str, Tensor],
        target: Tensor,
        shapes: Shapes,
        num_microbatches: int,
    ) -> Tensor | None:
        """Add the gradients of the loss of (output, target), which is the sum over microbatches.

        Returns that sum, detached, on the process with the last stage; none elsewhere.
        """
        schedule, stages = self._schedule(shapes, num_microbatches, backward=True)
        losses: list[Tensor] = []
        schedule.step(
            *self._inputs(batch),
            target=target if self.has_last else None,
            losses=losses if self.has_last else None,
            return_outputs=False,
            **extras,
        )
        _let_go(stages)
        return torch.stack(losses).sum().detach() if self.has_last else None

    def _inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (batch,) if self.has_first else ()

    def _make_schedule(
        self, shapes: Shapes, num_microbatches: int, *, backward: bool
    ) -> tuple[Any, list[PipelineStage]]:
        total = num_stages(self._config)
        stages = [
            PipelineStage(
                module,
                index,
                total,
                self.device,
                input_args=_described(shapes.between, backward)
                if index
                else torch.empty(shapes.first, dtype=shapes.dtype, device="meta"),
                output_args=_described(
                    shapes.last if index == total - 1 else shapes.between, backward
                ),
                group=self.group,
            )
            for index, module in zip(self._stages, self.modules, strict=True)
        ]
        schedule = _SCHEDULES[self._config.pp_schedule](
            stages if is_looped(self._config) else stages[0],
            num_microbatches,
            loss_fn=self._loss if backward else None,
            scale_grads=False,
        )
        return schedule, stages


def _let_go(stages: list[PipelineStage]) -> None:
    """Of what they keep of all microbatches until their next step, which may never come."""
    for stage in stages:
        stage.clear_runtime_states()


def _described(shape: tuple[int, ...], backward: bool) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=backward)


def from_last_stage(value: Tensor | None, shape: tuple[int, ...], pipeline: Pipeline) -> Tensor:
    """What the process with the last stage has, in fp32, on every process of the pipeline."""
    value = torch.empty(shape, device=pipeline.device) if value is None else value.contiguous()
    source = dist.get_global_rank(pipeline.group, pipeline.rank_of_last)
    dist.broadcast(value, src=source, group=pipeline.group)
    return value


def gather_named(
    own: Mapping[str, Tensor], group: dist.ProcessGroup | None, *, to_all: bool = True
) -> dict[str, Tensor]:
    """Plain tensors that processes hold by name, all on each of them.

    Without `to_all` the first process alone has all; the others keep no more than their own.
    """
    if group is None:
        return dict(own)
    described: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: (tuple(value.shape), value.dtype) for name, value in own.items()}
    dist.all_gather_object(described, mine, group=group)
    device = next(iter(own.values())).device
    keeps = to_all or dist.get_rank(group) == 0
    result = dict(own)
    owners = {name: rank for rank, names in reversed([*enumerate(described)]) for name in names}
    for name, rank in owners.items():
        if rank == dist.get_rank(group):
            value = own[name].contiguous()
        else:
            shape, dtype = described[rank][name]
            value = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, src=dist.get_global_rank(group, rank), group=group)
        if keeps:
            result[name] = value
    return result

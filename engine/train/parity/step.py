"""One step of a column in a layout, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from carillon.engine.parallel.collectives import gradient_norm, own_values, sum_over, whole
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder

Exchange = Literal["gather", "ring"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What changes no step: how much is kept, how much is computed at once, how texts travel."""

    recompute: bool = False
    cached: bool = False  # gradients by microbatches
    compile: bool = False
    exchange: Exchange = "gather"

    @property
    def name(self) -> str:
        said = [name for name in ("recompute", "cached", "compile") if getattr(self, name)]
        return " + ".join([*said, *(["ring"] if self.exchange == "ring" else [])]) or "plain"

    def settings(self) -> dict[str, bool]:
        """Those of `distributed`."""
        return {"grad_checkpointing": self.recompute, "compile": self.compile}


@dataclass(frozen=True)
class Step:
    """What a step gave: the loss of the global batch, the whole gradients, their norm as the
    trainer takes it, the share of all weights on the process that has most, and the bytes that
    the main process kept for the backward pass."""

    loss: float
    gradients: Mapping[str, Tensor]
    norm: float
    held: float
    kept_bytes: int


# One step of a model of so many blocks in a layout; without one, in this process alone.
Run = Callable[[DistributedConfig | None, World | None, Variant, int], Step]


def mean_over(loss: Tensor, group: dist.ProcessGroup | None) -> float:
    size = dist.get_world_size(group) if group is not None else 1
    return float(sum_over(loss.double(), group)) / size


def measured(loss: float, model: nn.Module, world: World | None, kept_bytes: int) -> Step:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")
        gradients[name] = whole(parameter.grad)
    stages = world.axis("pp") if world is not None else None
    group = stages.get_group() if stages is not None else None
    gradients = gather_named(gradients, group)
    num_values = sum(gradient.numel() for gradient in gradients.values())
    held = sum(own_values(parameter).numel() for parameter in model.parameters()) / num_values
    once = model.parameters()
    if isinstance(model, PipelinedDualEncoder | PipelinedDecoder):
        once = model.counted_parameters()
    norm = float(gradient_norm(once, group))
    most = torch.tensor(held)
    if world is not None and world.group is not None:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=world.group)
    on_cpu = {name: gradient.cpu() for name, gradient in gradients.items()}
    return Step(loss, on_cpu, norm, float(most), kept_bytes)


class Kept(saved_tensors_hooks):
    """Counts what autograd keeps inside, every storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        super().__init__(self._count, lambda kept: kept)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def _count(self, tensor: Tensor) -> Tensor:
        local = own_values(tensor)
        storage = local.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

"""The models that every layout is held to: the columns of the parity table.

Each is small, has every kind of module that its plans name, and takes one step of a fixed global
batch: in one process for the reference, and in a layout on a process's share of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from carillon.engine.data.loader import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import (
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import gradient_norm, sum_over, whole
from carillon.engine.parallel.mesh import DistributedConfig, World
from carillon.engine.train.step import forward_backward

Exchange = Literal["gather", "ring"]
_TEXT = TextOverrides(context=12, width=32, depth=2, num_heads=4)
_VISION = VisionOverrides(image_size=16, width=32, depth=2, num_heads=4)
CLIP = DualEncoderConfig(
    dims=24,
    vision_backbone="vit-ti-8",
    vision=_VISION,
    text_backbone="clip-text-ti",
    text=_TEXT,
)
# The other way to pool, both kinds of mask, and every norm.
POOLED = DualEncoderConfig(
    dims=24,
    vision_backbone="vit-ti-8",
    vision=replace(_VISION, pool="attention", qk_norm=True),
    text_backbone="bertlike-encoder-ti",
    text=replace(_TEXT, qk_norm=True),
    projection="mlp",
)
_BATCH, _VOCABULARY, _SEED = 16, 50, 3


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
    trainer takes it, and the share of all weights on the process that has most."""

    loss: float
    gradients: Mapping[str, Tensor]
    norm: float
    held: float


# One step in a layout; without one, in this process alone.
Run = Callable[[DistributedConfig | None, World | None, Variant], Step]


def dual_encoder(config: DualEncoderConfig, kind: Literal["softmax", "sigmoid"]) -> Run:
    """A dual encoder with one of the contrastive losses."""

    def run(layout: DistributedConfig | None, world: World | None, variant: Variant) -> Step:
        model = build_dual_encoder(
            config,
            vocab_size=_VOCABULARY,
            init_bias=-3.0 if kind == "sigmoid" else None,
            generator=torch.Generator().manual_seed(1),
        )
        objective = ContrastiveObjective(ContrastiveConfig(kind=kind, exchange=variant.exchange))
        share, group = _BATCH, None
        local = _pairs()
        if world is not None and layout is not None:
            model = apply_layout(model, layout, world)
            share, group = _BATCH // world.degrees.data, world.data_group
            local = local.microbatches(share)[world.data_rank].to(world.device)
        micro = share if not variant.cached else 3 if share > 4 else 1
        loss = forward_backward(
            model, objective, local.microbatches(micro), group=group, autocast=nullcontext
        )
        return _step(_mean(loss, group), model, world)

    return run


def _pairs() -> Batch:
    generator = torch.Generator().manual_seed(_SEED)
    lengths = torch.randint(3, 13, (_BATCH,), generator=generator)
    return Batch(
        images=torch.randint(0, 256, (_BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, _VOCABULARY, (_BATCH, 12), generator=generator),
        lengths=lengths,
        keys=[str(i) for i in range(_BATCH)],
        languages=["en"] * _BATCH,
        bad=[],
    )


def _mean(loss: Tensor, group: dist.ProcessGroup | None) -> float:
    size = dist.get_world_size(group) if group is not None else 1
    return float(sum_over(loss.double(), group)) / size


def _step(loss: float, model: nn.Module, world: World | None) -> Step:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")
        gradients[name] = whole(parameter.grad).cpu()
    num_values = sum(gradient.numel() for gradient in gradients.values())
    held = sum(_local(parameter).numel() for parameter in model.parameters()) / num_values
    norm = float(gradient_norm(model.parameters()))
    most = torch.tensor(held)
    if world is not None and world.group is not None:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=world.group)
    return Step(loss, gradients, norm, float(most))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# The name of a column, and what runs it.
COLUMNS: Mapping[str, Run] = {
    "dual encoder, softmax": dual_encoder(CLIP, "softmax"),
    "dual encoder, sigmoid": dual_encoder(CLIP, "sigmoid"),
    "pooled dual encoder, softmax": dual_encoder(POOLED, "softmax"),
}

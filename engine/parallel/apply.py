"""The only order in which a model is laid out: PP split -> TP/SP -> EP -> CP -> recompute ->
compile -> FSDP.

Each must see what the one before it made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule

from carillon.engine.config import UserError
from carillon.engine.models.plans import decoder_problems, plan_of
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.dual_encoder import DualEncoder
from carillon.engine.nn.fp8_layers import to_fp8
from carillon.engine.parallel.context import share_context
from carillon.engine.parallel.expert import split_experts
from carillon.engine.parallel.fp8 import split_fp8
from carillon.engine.parallel.fsdp import shard_over_data
from carillon.engine.parallel.mesh import DistributedConfig, World
from carillon.engine.parallel.tensor import overlap_exchange, split_tensors

M = TypeVar("M", DualEncoder, Decoder)


def apply_layout(model: M, config: DistributedConfig, world: World) -> M:
    """Lay `model` out over the world, in place; returns it.

    Raises UserError for a layout that a decoder cannot have.
    """
    if isinstance(model, Decoder):
        problems = list(decoder_problems(model.config, config))
        if problems:
            raise UserError("; ".join(problems))
    model.to(world.device)
    tp = world.axis("tp")
    if tp is not None:
        plan = plan_of(model, config.tp_whole_tower)
        split_tensors(model, plan, tp, by_tokens=config.sequence_parallel)
        if config.async_tp:
            overlap_exchange(tp)
    split_experts(model, world, config.dispatcher)
    context = world.axis("cp")
    if context is not None:
        share_context(model, config.cp_method, context.get_group())
    if config.precision == "fp8":
        layers = to_fp8(
            model,
            config.fp8_recipe,
            provider=config.fp8_provider,
            keep_blocks=config.fp8_keep_blocks,
            history=config.fp8_history,
        )
        split_fp8(layers.values(), world.group)
    model.set_recompute(config.grad_checkpointing)
    if config.compile:
        # Split blocks are compiled per length: with symbolic sizes DTensor recurses without end.
        dynamic = world.degrees.tp == 1
        for block in _blocks(model):
            block.compile(dynamic=dynamic)
    reshard = config.zero_stage == 3
    shard_over_data(model, [model], _blocks(model), config, world, reshard=reshard)
    return model


def _blocks(model: DualEncoder | Decoder) -> Iterator[nn.Module]:
    return iter(model.blocks) if isinstance(model, Decoder) else model.blocks()


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over the data axes in backward passes inside, or only add them up
    locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield

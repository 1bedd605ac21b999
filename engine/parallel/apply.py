"""The only order in which a model is laid out: PP split -> TP/SP -> EP -> CP -> recompute ->
compile -> FSDP.

Each must see what the one before it made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

from torch import nn
from torch.distributed.fsdp import FSDPModule

from carillon.engine.config import UserError
from carillon.engine.models.plans import decoder_problems, plan_of
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.dual_encoder import DualEncoder
from carillon.engine.nn.fp8_layers import to_fp8
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.context import share_context
from carillon.engine.parallel.expert import split_experts
from carillon.engine.parallel.fp8 import split_fp8
from carillon.engine.parallel.fsdp import shard_over_data
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.parallel.tensor import overlap_exchange, split_tensors

LaidOut = DualEncoder | PipelinedDualEncoder
LaidOutDecoder = Decoder | PipelinedDecoder


@overload
def apply_layout(model: DualEncoder, config: DistributedConfig, world: World) -> LaidOut: ...
@overload
def apply_layout(model: Decoder, config: DistributedConfig, world: World) -> LaidOutDecoder: ...
def apply_layout(
    model: DualEncoder | Decoder, config: DistributedConfig, world: World
) -> LaidOut | LaidOutDecoder:
    """Lay `model` out over the world and return it: itself, or this process's stages of it.

    Raises UserError for a layout that a decoder cannot have.
    """
    if isinstance(model, Decoder):
        problems = list(decoder_problems(model.config, config))
        if problems:
            raise UserError("; ".join(problems))
    pp, tp = world.axis("pp"), world.axis("tp")
    laid_out: LaidOut | LaidOutDecoder = model
    if pp is not None:
        laid_out = (
            PipelinedDualEncoder(model, config, pp.get_group(), world.device)
            if isinstance(model, DualEncoder)
            else PipelinedDecoder(model, config, pp.get_group(), world.device)
        )
    laid_out.to(world.device)
    roots: list[nn.Module] = [laid_out]
    if isinstance(laid_out, PipelinedDualEncoder | PipelinedDecoder):
        roots = list(laid_out.parts)
    if tp is not None:
        plan = plan_of(model, config.tp_whole_tower)
        for root in roots:
            split_tensors(root, plan, tp, by_tokens=config.sequence_parallel)
        if config.async_tp:
            overlap_exchange(tp)
    split_experts(laid_out, world, config.dispatcher)
    context = world.axis("cp")
    if context is not None:
        share_context(laid_out, config.cp_method, context.get_group())
    if config.precision == "fp8":
        layers = to_fp8(
            model,
            config.fp8_recipe,
            provider=config.fp8_provider,
            keep_blocks=config.fp8_keep_blocks,
            history=config.fp8_history,
            parts=roots,
        )
        across = [world.loss_group, tp.get_group() if tp is not None else None]
        split_fp8(layers.values(), [group for group in across if group is not None])
    laid_out.set_recompute(config.grad_checkpointing)
    if config.compile:
        # Split blocks are compiled per length: with symbolic sizes DTensor recurses without end.
        dynamic = world.degrees.tp == 1
        for block in _blocks(laid_out):
            block.compile(dynamic=dynamic)
    # A pipeline's schedule gathers and frees the weights of its stages itself.
    reshard = config.zero_stage == 3 and pp is None
    shard_over_data(laid_out, roots, _blocks(laid_out), config, world, reshard=reshard)
    return laid_out


def _blocks(model: LaidOut | LaidOutDecoder) -> Iterator[nn.Module]:
    return iter(model.blocks) if isinstance(model, Decoder) else model.blocks()


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over the data axes in backward passes inside, or only add them up
    locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield

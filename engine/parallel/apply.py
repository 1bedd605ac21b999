"""The only order in which a model is laid out: PP split -> TP/SP -> EP -> CP -> recompute ->
compile -> FSDP.

Data parallelism is FSDP2 on the (dp_replicate, fsdp) mesh in every case: plain replication is
its corner with one shard, so there is one mechanism and one gradient reduction. Each must see what
the one before it made. The axes that are missing join here, each as one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from carillon.engine.models.plans import plan_of
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.dual_encoder import DualEncoder
from carillon.engine.nn.fp8 import to_fp8
from carillon.engine.parallel.expert import expert_units, placing, split_experts
from carillon.engine.parallel.mesh import DistributedConfig, World
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
    """Lay `model` out over the world and return it: itself, or this process's stages of it."""
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
    split_experts(laid_out, world)
    if config.precision == "fp8":
        to_fp8(_blocks(laid_out), config.fp8_recipe)
    laid_out.set_recompute(config.grad_checkpointing)
    if config.compile:
        # Split blocks are compiled per length: with symbolic sizes DTensor recurses without end.
        dynamic = world.degrees.tp == 1
        for block in _blocks(laid_out):
            block.compile(dynamic=dynamic)
    mesh = world.fsdp_mesh
    if mesh is not None:
        # A pipeline's schedule gathers and frees the weights of its stages itself.
        reshard = config.zero_stage == 3 and pp is None
        for experts in expert_units(laid_out, world):
            fully_shard(
                experts,
                mesh=world.expert_mesh,
                reshard_after_forward=reshard,
                shard_placement_fn=placing(world),
            )
        for unit in (*_units(laid_out, world), *roots):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    return laid_out


def _units(model: LaidOut | LaidOutDecoder, world: World) -> Iterator[nn.Module]:
    """Parts that communicate on their own: the blocks, so that they overlap with compute.

    Replicas on CPUs have nothing to overlap with and nothing to free: one exchange of all gradients
    at the end is quicker there.
    """
    if world.device.type == "cpu" and world.degrees.dp_shard == 1:
        return iter(())
    return _blocks(model)


def _blocks(model: LaidOut | LaidOutDecoder) -> Iterator[nn.Module]:
    return iter(model.blocks) if isinstance(model, Decoder) else model.blocks()


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over the data axes in backward passes inside, or only add them up
    locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield

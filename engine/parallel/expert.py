"""Expert parallelism: experts split over the ep processes, tokens sent to them and back.

Each process routes its own tokens and lays their slots out by expert; an all-to-all brings every
row to the process that has its expert and another one brings the results home, where they are
weighed and summed. How many rows go where depends on the data: counts are exchanged first, and one
read of them a mixture makes the host wait. With a capacity, dropped slots are never sent.
An expert's parameters are DTensors, split by expert over ep and by hidden features over tp: each tp
process sends the same rows and gets its share of each result, which is summed at home. FSDP shards
what is left over `World.expert_mesh` and takes the mean over fewer processes than the loss has;
gradients are divided by ep for that.
Left out: overlap of the exchange with products, and experts that move between processes.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.

Legend: T tokens, K experts of a token, D width, E experts, X experts of a process, W ep processes,
S rows received, R rows laid out by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from carillon.engine.config import UserError
from carillon.engine.nn.moe import ALIGNMENT, Dispatch, Experts, Moe, Slots, dispatch_here
from carillon.engine.parallel.collectives import (
    exchange_rows,
    scale_gradient,
    sum_gradients,
    sum_shares,
)
from carillon.engine.parallel.config import Dispatcher
from carillon.engine.parallel.expert_buffers import BufferDispatch
from carillon.engine.parallel.mesh import World
from carillon.kernels.table import resolve

_HIDDEN_DIM = {"gate_up": 2, "down": 1}  # of (X, D, 2F) and (X, F, D)


def split_experts(model: nn.Module, world: World, dispatcher: Dispatcher) -> None:
    """Split the experts of every mixture in `model` over ep and tp, in place."""
    ep, tp = world.axis("ep"), _tp_of_experts(world)
    if ep is None and tp is None:
        return
    dispatch = _dispatch(ep, tp, dispatcher)
    for module in model.modules():
        if isinstance(module, Moe):
            _split(module.experts, world)
            module.experts.own_share = partial(_own_share, world.degrees.ep)
            module.dispatch = dispatch


def expert_units(model: nn.Module, world: World) -> list[Experts]:
    """The experts that FSDP shards over another mesh than their blocks."""
    if world.degrees.ep == 1:
        return []
    return [module for module in model.modules() if isinstance(module, Experts)]


def shard_of(parameter: nn.Parameter, degree: int) -> Shard:
    """The dim by which FSDP shards an expert parameter over `degree` processes: whole experts where
    they divide, else a dim that does.

    Raises UserError where none does.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    for dim, size in enumerate(local.shape):
        if size % degree == 0:
            return Shard(dim)
    raise UserError(
        f"distributed: {degree} processes cannot shard experts of which each has "
        f"{' x '.join(map(str, local.shape))} values; one of these must be a multiple of {degree}: "
        "raise distributed.ep, or change model.moe.expert_width"
    )


def _split(experts: Experts, world: World) -> None:
    meshes = world.meshes
    assert meshes is not None  # a degree is above 1
    axes = [axis for axis in ("ep", "tp") if getattr(world.degrees, axis) > 1]
    mesh = (meshes.experts or meshes.dense)[tuple(axes)]
    for name, hidden_dim in _HIDDEN_DIM.items():
        weight = getattr(experts, name)
        placements = [Shard(0 if axis == "ep" else hidden_dim) for axis in axes]
        # Every process has drawn the same weights: each takes its part of its own.
        laid_out = distribute_tensor(weight.data, mesh, placements, src_data_rank=None)
        setattr(experts, name, nn.Parameter(laid_out))


def _own_share(ep: int, weight: Tensor) -> Tensor:
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return scale_gradient(local, 1 / ep) if ep > 1 else local


def _tp_of_experts(world: World) -> DeviceMesh | None:
    experts = world.meshes.experts if world.meshes is not None else None
    return experts["tp"] if experts is not None and world.degrees.tp > 1 else world.axis("tp")


def _dispatch(ep: DeviceMesh | None, tp: DeviceMesh | None, dispatcher: Dispatcher) -> Dispatch:
    dispatch: Dispatch = dispatch_here
    if ep is not None and dispatcher == "deepep":
        dispatch = BufferDispatch(ep.get_group())
    elif ep is not None:
        dispatch = partial(dispatch_over, ep.get_group())
    return dispatch if tp is None else partial(_summed, tp.get_group(), dispatch)


def _summed(
    group: dist.ProcessGroup,
    dispatch: Dispatch,
    x_TD: Tensor,
    weights_TK: Tensor,
    slots: Slots,
    experts: Experts,
) -> Tensor:
    """Each process has a share of every expert's hidden features, so of every result."""
    x_TD, weights_TK = sum_gradients(x_TD, group), sum_gradients(weights_TK, group)
    return sum_shares(dispatch(x_TD, weights_TK, slots, experts), group)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes are read back
def dispatch_over(
    group: dist.ProcessGroup, x_TD: Tensor, weights_TK: Tensor, slots: Slots, experts: Experts
) -> Tensor:
    """To the processes of `group` that have the experts, and back: (T, D)."""
    size = dist.get_world_size(group)
    own = slots.num_experts // size
    plan = slots.plan(alignment=1)
    maps = (plan.row_to_slot, plan.slot_to_row)
    sent_WX = plan.offsets.diff().view(size, own)
    received_WX = torch.empty_like(sent_WX)
    dist.all_to_all_single(received_WX, sent_WX, group=group)
    send, receive = torch.stack([sent_WX.sum(1), received_WX.sum(1)]).tolist()
    permute, unpermute = (resolve(f"moe_{name}", x_TD.device) for name in ("permute", "unpermute"))

    rows_RD = permute(x_TD, *maps)
    rows_SD = exchange_rows(rows_RD[: sum(send)], send, receive, group)
    local = Slots(_experts_of(received_WX, sum(receive)), 1, own, None)
    local_plan = local.plan(ALIGNMENT)
    ones_S1 = weights_TK.new_ones(local.indices.shape)
    results_SD = unpermute(
        experts(rows_SD, local_plan), ones_S1, local_plan.row_to_slot, local_plan.slot_to_row
    )
    home_RD = exchange_rows(results_SD, receive, send, group)
    home_RD = F.pad(home_RD, (0, 0, 0, len(rows_RD) - len(home_RD)))
    y_TD: Tensor = unpermute(home_RD, weights_TK, *maps)
    return y_TD


def _experts_of(received_WX: Tensor, num_rows: int) -> Tensor:
    """Which of the own experts each received row is for: they come by sender, then by expert."""
    size, own = received_WX.shape
    expert_WX = torch.arange(own, device=received_WX.device, dtype=torch.int32).repeat(size)
    experts_S = expert_WX.repeat_interleave(received_WX.flatten(), output_size=num_rows)
    return experts_S.unsqueeze(1)


def placing(world: World) -> Callable[[nn.Parameter], Shard]:
    """How FSDP shards the parameters of `expert_units`."""
    mesh = world.expert_mesh
    assert mesh is not None
    degree = mesh.size(1)
    return lambda parameter: shard_of(parameter, degree)

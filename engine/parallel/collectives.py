"""Collectives that autograd sees. Forward and backward are each other's transpose: sums, no means.

The list forms of the collectives are used: the single-tensor ones were renamed between torch 2.11
and 2.13, and both ends of that range have these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank used every row: a row's gradient is the sum over ranks of its slice.
        return scatter_sums(grad, ctx.group), None


def gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in rank order; every rank must hold as many.

    Shapes: (n, ...) -> (world x n, ...). The backward pass sums what the ranks send back.
    """
    if group is None:
        return local
    gathered: Tensor = _GatherRows.apply(local, group)  # type: ignore[no-untyped-call]
    return gathered


class _ExchangeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(blocks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.contiguous()
    received = torch.empty_like(values)
    dist.all_to_all_single(received, values, group=group)
    return received


def exchange_blocks(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Block i goes to rank i; those that arrive are in the order of the senders.

    Shapes: (world, ...) -> (world, ...). The backward pass sends gradients back the same way.
    """
    exchanged: Tensor = _ExchangeBlocks.apply(blocks, group)  # type: ignore[no-untyped-call]
    return exchanged


def exchange_shares(shares: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Each rank holds a share of everyone's values; it gets all shares of its own.

    Shapes: (world x n,), in rank order of the owners -> (world, n), in rank order of the senders.
    """
    if group is None:
        return shares.unsqueeze(0)
    return exchange_blocks(shares.view(dist.get_world_size(group), -1), group)


def scatter_sums(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of a rank's own rows, without gradient: (world x n, ...) -> (n, ...)."""
    parts = [part.contiguous() for part in values.chunk(dist.get_world_size(group))]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        return _send_rows(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _send_rows(grad, receive, send, ctx.group), None, None, None


def _send_rows(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def exchange_rows(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    """`send[i]` rows to rank i, in rank order, and `receive[i]` from it, in rank order.

    Shapes: (sum of send, ...) -> (sum of receive, ...). The backward pass sends them back.
    """
    exchanged: Tensor = _ExchangeRows.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return exchanged


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


def sum_gradients(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The identity on what all ranks have; the backward pass sums what each makes of it."""
    same: Tensor = _SumGradients.apply(values, group)  # type: ignore[no-untyped-call]
    return same


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_over(share.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Element-wise sum over ranks, which all then have; each share's gradient is the sum's."""
    total: Tensor = _SumShares.apply(share, group)  # type: ignore[no-untyped-call]
    return total


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The identity; its gradient is multiplied by `factor`."""
    same: Tensor = _ScaleGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return same


def gradient_norm(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None
) -> Tensor:
    """The 2-norm of all gradients, laid out in whatever ways. Shape: ().

    With a group, of what its processes hold together, each gradient given by one of them.
    """
    groups = by_mesh([parameter.grad for parameter in parameters if parameter.grad is not None])
    norms = [whole(torch.nn.utils.get_total_norm(gradients)) for gradients in groups]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    return norm if group is None else sum_over(norm.square(), group).sqrt()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale all gradients down to the norm `limit`, where theirs is above; in place.

    As torch.nn.utils.clip_grads_with_norm_, but of each process's own values: DTensor takes seconds
    to work out a list's layouts the first time, a time quadratic in its length.
    """
    own = [own_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(own, (limit / (norm + 1e-6)).clamp(max=1.0))


def own_values(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be laid out over processes."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Those that lie on one mesh together: torch's operations on lists take no other."""
    groups: dict[DeviceMesh | None, list[T]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be laid out over processes, as a plain one."""
    result: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return result


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Element-wise sum over ranks, without gradient, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def largest_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Element-wise largest over ranks, without gradient, in place."""
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values

"""Collectives that autograd sees. Forward and backward are each other's transpose: sums, no means.

The list forms of the collectives are used: the single-tensor ones were renamed between torch 2.11
and 2.13, and both ends of that range have these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank used every row: a row's gradient is the sum over ranks of its slice.
        parts = [part.contiguous() for part in grad.chunk(dist.get_world_size(ctx.group))]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


def gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in rank order; every rank must hold as many.

    Shapes: (n, ...) -> (world x n, ...). The backward pass sums what the ranks send back.
    """
    if group is None:
        return local
    gathered: Tensor = _GatherRows.apply(local, group)  # type: ignore[no-untyped-call]
    return gathered


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Element-wise sum over ranks, without gradient, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values

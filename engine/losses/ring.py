"""The contrastive ops over a data group, a chunk of columns at a time around a ring.

Each rank takes its own rows against the chunk that it holds while the next is in flight. A column's
log-sum-exp is merged by the ranks that its chunk passes. Backward, the chunks go around once more
with the statistics and gradients of all their pairs, and their own gradient comes home behind them:
the op's backward gives a rank's share of it. No rank ever holds all columns.
The results and gradients are those of the gathered form; the price is a second trip and a message
a step. Log-sum-exps and the scale's gradient are merged in float64, so that the number of ranks
does not add to their rounding; a chunk's gradient is summed in its own dtype. Deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from carillon.engine.parallel.ring import Parts, Ring
from carillon.kernels.contrastive.reference import PairReductions
from carillon.kernels.table import resolve


def contrastive(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    group: dist.ProcessGroup | None,
    *,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    with_sums: bool = False,
    provider: str | None = None,
) -> PairReductions:
    """As gathered.contrastive; differentiable once."""
    how = _How(Ring(group), provider)
    return PairReductions(
        *_Softmax.apply(rows, columns, scale, row_ids, column_ids, with_sums, how)  # type: ignore[no-untyped-call]
    )


def contrastive_sigmoid(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup | None,
    *,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    provider: str | None = None,
) -> Tensor:
    """As gathered.contrastive_sigmoid; differentiable once."""
    how = _How(Ring(group), provider)
    losses: Tensor = _Sigmoid.apply(rows, columns, scale, bias, row_ids, column_ids, how)  # type: ignore[no-untyped-call]
    return losses


class _How(NamedTuple):
    """Which ranks take part, and what computes a chunk."""

    ring: Ring
    provider: str | None

    def op(self, name: str, rows: Tensor) -> Any:
        return resolve(name, rows.device, self.provider)

    def first_column(self, owner: int, rows: Tensor, chunk: Parts) -> int:
        """Matches are in a rank's own chunk alone: for others this lies outside."""
        return (self.ring.rank - owner) * max(len(rows), len(chunk["columns"]))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        with_sums: bool,
        how: _How,
    ) -> tuple[Tensor, ...]:
        op = how.op("contrastive", rows)
        row_lse = rows.new_full((len(rows),), -torch.inf, dtype=torch.float64)
        positive, row_sum = torch.zeros_like(row_lse), torch.zeros_like(row_lse)

        def visit(owner: int, chunk: Parts) -> Parts:
            first = how.first_column(owner, rows, chunk)
            found = PairReductions(
                *op(rows, chunk["columns"], scale, first, row_ids, chunk.get("ids"), with_sums)
            )
            torch.logaddexp(row_lse, found.row_lse.double(), out=row_lse)
            positive.add_(found.positive)
            if not with_sums:
                return {"lse": found.column_lse.double()}
            row_sum.add_(found.row_sum)
            return {"lse": found.column_lse.double(), "sum": found.column_sum.double()}

        merged = how.ring.around(_chunk(columns=columns, ids=column_ids), visit, _merge)
        dtype = scale.dtype
        by_row, by_column = row_lse.to(dtype), merged["lse"].to(dtype)
        ctx.how = how
        ctx.save_for_backward(rows, columns, scale, row_ids, column_ids, by_row, by_column)
        sums = (row_sum, merged["sum"]) if with_sums else (row_sum[:0], row_sum[:0])
        ctx.with_sums = with_sums
        return by_row, by_column, positive.to(dtype), *(one.to(dtype) for one in sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_ids, column_ids, row_lse, column_lse = ctx.saved_tensors
        by_lse, by_column_lse, by_positive, by_sum, by_column_sum = grads
        how: _How = ctx.how
        op = how.op("contrastive_backward", rows)
        rows_grad = torch.zeros_like(rows)
        scale_grad = torch.zeros_like(scale, dtype=torch.float64)

        def visit(owner: int, chunk: Parts) -> Parts:
            first = how.first_column(owner, rows, chunk)
            shares = op(
                *(rows, chunk["columns"], scale, first, row_ids, chunk.get("ids")),
                *(row_lse, chunk["lse"], by_lse, chunk["by_lse"], by_positive),
                *(by_sum if ctx.with_sums else None, chunk.get("by_sum")),
            )
            rows_grad.add_(shares[0])
            scale_grad.add_(shares[2])
            return {"grad": shares[1]}

        chunk = _chunk(
            columns=columns,
            ids=column_ids,
            lse=column_lse,
            by_lse=by_column_lse,
            by_sum=by_column_sum if ctx.with_sums else None,
        )
        home = how.ring.around(chunk, visit, _merge)
        return rows_grad, home["grad"], scale_grad.to(scale.dtype), None, None, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        how: _How,
    ) -> Tensor:
        op = how.op("contrastive_sigmoid", rows)
        losses = rows.new_zeros(len(rows), dtype=torch.float64)

        def visit(owner: int, chunk: Parts) -> Parts:
            first = how.first_column(owner, rows, chunk)
            losses.add_(op(rows, chunk["columns"], scale, bias, first, row_ids, chunk.get("ids")))
            return {}

        how.ring.around(_chunk(columns=columns, ids=column_ids), visit, _merge)
        ctx.how = how
        ctx.save_for_backward(rows, columns, scale, bias, row_ids, column_ids)
        return losses.to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias, row_ids, column_ids = ctx.saved_tensors
        how: _How = ctx.how
        op = how.op("contrastive_sigmoid_backward", rows)
        rows_grad = torch.zeros_like(rows)
        scale_grad, bias_grad = (torch.zeros_like(scale, dtype=torch.float64) for _ in range(2))

        def visit(owner: int, chunk: Parts) -> Parts:
            first = how.first_column(owner, rows, chunk)
            shares = op(rows, chunk["columns"], scale, bias, first, row_ids, chunk.get("ids"), grad)
            rows_grad.add_(shares[0])
            scale_grad.add_(shares[2])
            bias_grad.add_(shares[3])
            return {"grad": shares[1]}

        home = how.ring.around(_chunk(columns=columns, ids=column_ids), visit, _merge)
        dtype = scale.dtype
        gradients = rows_grad, home["grad"], scale_grad.to(dtype), bias_grad.to(dtype)
        return (*gradients, None, None, None)


def _chunk(**parts: Tensor | None) -> Parts:
    return {name: part for name, part in parts.items() if part is not None}


def _merge(before: Parts, own: Parts) -> Parts:
    """What two ranks found of a chunk: log-sum-exps merge by another, all else adds up."""
    return {
        name: torch.logaddexp(part, own[name]) if name == "lse" else part + own[name]
        for name, part in before.items()
    }

"""The contrastive ops over a data group, all columns gathered: one product a rank.

Each rank takes its own rows against all columns, which are gathered with gradients. A column's
log-sum-exp needs every rank's rows, so the ranks exchange their shares of it, a number a column.
Memory grows with the global batch: all columns, and their gradients, on every rank.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from carillon.engine.parallel.collectives import exchange_shares, gather_rows
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
    """The op's reductions of this rank's rows and columns, over those of all ranks.

    Shapes: as the op, with as many columns on every rank. Row i of a rank matches its column i;
    columns behind its rows match none. Differentiable as the op is.
    """
    op = resolve("contrastive", rows.device, provider)
    given = (*_all_columns(columns, group), row_ids, _gathered(column_ids, group))
    row_lse, column_lse, positive, row_sum, column_sum = op(
        rows, given[0], scale, *given[1:], with_sums
    )
    shares = exchange_shares(column_lse, group)  # (ranks, columns of this one)
    if with_sums:
        column_sum = exchange_shares(column_sum, group).sum(0)
    return PairReductions(row_lse, shares.logsumexp(0), positive, row_sum, column_sum)


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
    """The op's loss of each of this rank's rows over all ranks' columns; shapes as above."""
    op = resolve("contrastive_sigmoid", rows.device, provider)
    everywhere, first_column = _all_columns(columns, group)
    losses: Tensor = op(
        rows, everywhere, scale, bias, first_column, row_ids, _gathered(column_ids, group)
    )
    return losses


def _all_columns(columns: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Every rank's columns, and where this rank's stand among them."""
    first = dist.get_rank(group) * len(columns) if group is not None else 0
    return gather_rows(columns, group), first


def _gathered(ids: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | None:
    return None if ids is None else gather_rows(ids, group)

"""Definition of the contrastive ops: every row against every column, and what a loss needs of it.

The n x m logits are l_ij = scale * <row_i, column_j> (softmax), or that plus a bias (sigmoid). Row
i matches column `first_column` + i. With ids, a pair that does not match but has equal ids (two
pictures of one concept) is no negative: it is left out of every sum. An id below 0 is no id.
The softmax form returns reductions, not a loss: a loss of any weighting, smoothing or layout is a
few sums over n and m of them, and their gradients are one more product's worth of work. Columns
that no row matches (hard negatives) need nothing special.

Shape suffixes: N rows, M columns, D dims. Here the logits are held; a provider never holds them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.roofline import Cost

DTYPES = (torch.float32, torch.bfloat16)


class PairReductions(NamedTuple):
    """What `contrastive` returns, float32.

    Shapes: row_lse (N,) and column_lse (M,), log-sum-exp of the logits of a row or a column, -inf
    where all of it is left out; positive (N,), the matching logits; row_sum (N,) and column_sum
    (M,), sums of the logits, or (0,) where they were not asked for.
    """

    row_lse: Tensor
    column_lse: Tensor
    positive: Tensor
    row_sum: Tensor
    column_sum: Tensor


def contrastive(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    first_column: int = 0,
    row_ids_N: Tensor | None = None,
    column_ids_M: Tensor | None = None,
    with_sums: bool = False,
) -> PairReductions:
    """Log-sum-exp over rows and over columns of scale * rows @ columns.T, and the matching logits.

    Shapes: rows (N, D) and columns (M, D), float32 or bfloat16 (the products then take bfloat16
    factors and sum in float32); scale (1,) float32; ids (N,) and (M,) int64, both or neither.
    Differentiable in rows, columns and scale. Deterministic for a given number of threads.
    Source: Radford et al. 2021 (CLIP), figure 3, whose loss is the mean of the two log-sum-exps
    less the positives; its gradient needs no more than these, as in Milakov and Gimelshein 2018.

    Raises:
        ValueError: a wrong shape, dtype or device; rows that match no column.
    """
    check(rows_ND, columns_MD, scale, None, first_column, row_ids_N, column_ids_M)
    logits_NM = scale * (_wide(rows_ND) @ _wide(columns_MD).T)
    kept_NM = _kept(logits_NM, first_column, row_ids_N, column_ids_M)
    masked_NM = logits_NM if kept_NM is None else logits_NM.masked_fill(~kept_NM, float("-inf"))
    positive_N = logits_NM.diagonal(first_column)[: len(rows_ND)]
    row_sum_N = column_sum_M = logits_NM.new_empty(0)
    if with_sums:
        counted_NM = logits_NM if kept_NM is None else logits_NM * kept_NM
        row_sum_N, column_sum_M = counted_NM.sum(1), counted_NM.sum(0)
    return PairReductions(
        masked_NM.logsumexp(1), masked_NM.logsumexp(0), positive_N, row_sum_N, column_sum_M
    )


def contrastive_sigmoid(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_column: int = 0,
    row_ids_N: Tensor | None = None,
    column_ids_M: Tensor | None = None,
) -> Tensor:
    """Per row, the sum over columns of softplus(-z_ij l_ij): z is 1 for a match and -1 for others.

    Shapes: as `contrastive`, and bias (1,) float32 -> (N,) float32.
    Differentiable in rows, columns, scale and bias.
    Source: Zhai et al. 2023 (SigLIP), equation 1 without its mean over the batch.

    Raises:
        ValueError: as `contrastive`.
    """
    check(rows_ND, columns_MD, scale, bias, first_column, row_ids_N, column_ids_M)
    logits_NM = scale * (_wide(rows_ND) @ _wide(columns_MD).T) + bias
    signs_NM = -torch.ones_like(logits_NM)
    signs_NM.diagonal(first_column)[: len(rows_ND)] = 1.0
    losses_NM = F.softplus(-signs_NM * logits_NM)
    kept_NM = _kept(logits_NM, first_column, row_ids_N, column_ids_M)
    return (losses_NM if kept_NM is None else losses_NM * kept_NM).sum(1)


def _wide(features: Tensor) -> Tensor:
    """bfloat16 factors are multiplied exactly in float32, as a tensor core does."""
    return features if features.dtype == torch.float64 else features.float()


def _kept(
    logits_NM: Tensor, first_column: int, row_ids_N: Tensor | None, column_ids_M: Tensor | None
) -> Tensor | None:
    """False for pairs that are left out: equal ids, yet no match."""
    if row_ids_N is None or column_ids_M is None:
        return None
    equal_NM = (row_ids_N[:, None] == column_ids_M) & (row_ids_N[:, None] >= 0)
    match_NM = torch.zeros_like(equal_NM)
    match_NM.diagonal(first_column)[: len(row_ids_N)] = True
    return ~equal_NM | match_NM


def check(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first_column: int,
    row_ids_N: Tensor | None,
    column_ids_M: Tensor | None,
) -> None:
    """Raises ValueError, saying what was given and what is allowed."""
    name = "contrastive" if bias is None else "contrastive_sigmoid"
    if rows_ND.dim() != 2 or columns_MD.dim() != 2 or rows_ND.shape[1] != columns_MD.shape[1]:
        raise ValueError(
            f"{name}: rows and columns must have the shapes (N, D) and (M, D), "
            f"got {tuple(rows_ND.shape)} and {tuple(columns_MD.shape)}"
        )
    allowed = (*DTYPES, torch.float64)  # float64: the definition that providers are held to
    if rows_ND.dtype not in allowed or rows_ND.dtype != columns_MD.dtype:
        raise ValueError(
            f"{name}: rows and columns must both be float32 or both bfloat16, "
            f"got {rows_ND.dtype} and {columns_MD.dtype}"
        )
    for what, value in (("scale", scale), ("bias", bias)):
        if value is not None and (
            value.shape != (1,) or value.dtype not in (torch.float32, torch.float64)
        ):
            raise ValueError(
                f"{name}: {what} must be one float32 value of shape (1,), "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    n, m = len(rows_ND), len(columns_MD)
    if not 0 <= first_column <= m - n:
        raise ValueError(
            f"{name}: row i matches column first_column + i, so first_column must be from 0 to "
            f"M - N = {m - n}, got {first_column}"
        )
    if (row_ids_N is None) != (column_ids_M is None):
        raise ValueError(f"{name}: give row_ids and column_ids, or neither")
    for what, ids, length in (("row_ids", row_ids_N, n), ("column_ids", column_ids_M, m)):
        if ids is not None and (ids.shape != (length,) or ids.dtype != torch.int64):
            raise ValueError(
                f"{name}: {what} must be int64 of shape ({length},), "
                f"got {ids.dtype} of shape {tuple(ids.shape)}"
            )
    given = (rows_ND, columns_MD, scale, bias, row_ids_N, column_ids_M)
    devices = {str(value.device) for value in given if value is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: all tensors must be on one device, got {sorted(devices)}")


def cost(n: int, m: int, d: int, dtype: torch.dtype, *, backward: bool) -> Cost:
    """One product forward; backward the logits again and one product for each side's gradient.

    Features are read once and gradients written once; nothing of size n x m is moved.
    """
    products = 3 if backward else 1
    return Cost(
        flops=2.0 * n * m * d * products,
        size_bytes=float((n + m) * d * dtype.itemsize * (2 if backward else 1)),
    )

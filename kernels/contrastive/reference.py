"""Definition of the contrastive ops: every row against every column, and what a loss needs of it.

The n x m logits are l_ij = scale * <row_i, column_j> (softmax), or that plus a bias (sigmoid). Row
i matches column `first_column` + i, any integer, where that is one of the m columns; else it has no
match among them. With ids, a pair that does not match but has equal ids (two pictures of one
concept) is no negative: it is left out of every sum. An id below 0 is no id.
The softmax form returns reductions, not a loss: a loss of any weighting, smoothing or layout is a
few sums over n and m of them, and their gradients are one more product's worth of work. So columns
may come in chunks: positives, sums and sigmoid losses of chunks add up, their log-sum-exps merge by
another, and the backward op with those of all columns and of all rows gives a chunk's share.
Columns that no row matches (hard negatives) need nothing special.

Shape suffixes: N rows, M columns, D dims. Here the logits are held; a provider never holds them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.contrastive.check import check, check_both, check_vectors
from carillon.kernels.roofline import Cost


class PairReductions(NamedTuple):
    """What `contrastive` returns, float32.

    Shapes: row_lse (N,) and column_lse (M,), log-sum-exp of the logits of a row or a column, -inf
    where all of it is left out; positive (N,), the matching logits, 0 for a row without a match;
    row_sum (N,) and column_sum (M,), sums of the logits, or (0,) where they were not asked for.
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
        ValueError: a wrong shape, dtype or device.
    """
    check("contrastive", rows_ND, columns_MD, scale, None, row_ids_N, column_ids_M)
    logits_NM = scale * (_wide(rows_ND) @ _wide(columns_MD).T)
    kept_NM = _kept(first_column, row_ids_N, column_ids_M)
    masked_NM = logits_NM if kept_NM is None else logits_NM.masked_fill(~kept_NM, float("-inf"))
    matching = _matching(logits_NM, first_column)
    before = _before(first_column, len(rows_ND))
    positive_N = F.pad(matching, (before, len(rows_ND) - before - len(matching)))
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
    check("contrastive_sigmoid", rows_ND, columns_MD, scale, bias, row_ids_N, column_ids_M)
    logits_NM = scale * (_wide(rows_ND) @ _wide(columns_MD).T) + bias
    losses_NM = F.softplus(-_signs(logits_NM, first_column) * logits_NM)
    kept_NM = _kept(first_column, row_ids_N, column_ids_M)
    return (losses_NM if kept_NM is None else losses_NM * kept_NM).sum(1)


def contrastive_backward(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    first_column: int,
    row_ids_N: Tensor | None,
    column_ids_M: Tensor | None,
    row_lse_N: Tensor,
    column_lse_M: Tensor,
    row_lse_grad_N: Tensor,
    column_lse_grad_M: Tensor,
    positive_grad_N: Tensor,
    row_sum_grad_N: Tensor | None,
    column_sum_grad_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrastive` by rows, columns and scale, from those by each of its results.

    The log-sum-exps may be of more columns and rows than these: then this is the share of these
    pairs. The gradient of one that is -inf counts for nothing, nor does a positive's that is not
    among these columns.

    Raises:
        ValueError: as `contrastive`; a vector of another length, dtype or device; one sum's
            gradient without the other's.
    """
    op = "contrastive_backward"
    check(op, rows_ND, columns_MD, scale, None, row_ids_N, column_ids_M)
    check_vectors(
        op, rows_ND, len(rows_ND), row_lse=row_lse_N, row_lse_grad=row_lse_grad_N,
        positive_grad=positive_grad_N, row_sum_grad=row_sum_grad_N,
    )  # fmt: skip
    check_vectors(
        op, rows_ND, len(columns_MD), column_lse=column_lse_M, column_lse_grad=column_lse_grad_M,
        column_sum_grad=column_sum_grad_M,
    )  # fmt: skip
    check_both(op, row_sum_grad_N, column_sum_grad_M)
    dots_NM = _wide(rows_ND) @ _wide(columns_MD).T
    weights_NM = _share(scale * dots_NM, row_lse_N[:, None], row_lse_grad_N[:, None])
    weights_NM += _share(scale * dots_NM, column_lse_M, column_lse_grad_M)
    if row_sum_grad_N is not None and column_sum_grad_M is not None:
        weights_NM += row_sum_grad_N[:, None] + column_sum_grad_M
    kept_NM = _kept(first_column, row_ids_N, column_ids_M)
    if kept_NM is not None:
        weights_NM = weights_NM.masked_fill(~kept_NM, 0.0)
    matching = _matching(weights_NM, first_column)
    matching += positive_grad_N[_before(first_column, len(rows_ND)) :][: len(matching)]
    return _gradients(rows_ND, columns_MD, scale, dots_NM, weights_NM)


def contrastive_sigmoid_backward(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_column: int,
    row_ids_N: Tensor | None,
    column_ids_M: Tensor | None,
    row_loss_grad_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `contrastive_sigmoid` by rows, columns, scale and bias.

    Raises:
        ValueError: as `contrastive_sigmoid`; a gradient of another length, dtype or device.
    """
    op = "contrastive_sigmoid_backward"
    check(op, rows_ND, columns_MD, scale, bias, row_ids_N, column_ids_M)
    check_vectors(op, rows_ND, len(rows_ND), row_loss_grad=row_loss_grad_N)
    dots_NM = _wide(rows_ND) @ _wide(columns_MD).T
    signs_NM = _signs(dots_NM, first_column)
    logits_NM = scale * dots_NM + bias
    weights_NM = -signs_NM * torch.sigmoid(-signs_NM * logits_NM) * row_loss_grad_N[:, None]
    kept_NM = _kept(first_column, row_ids_N, column_ids_M)
    if kept_NM is not None:
        weights_NM = weights_NM.masked_fill(~kept_NM, 0.0)
    gradients = _gradients(rows_ND, columns_MD, scale, dots_NM, weights_NM)
    return (*gradients, weights_NM.sum().reshape(1))


def _gradients(
    rows_ND: Tensor, columns_MD: Tensor, scale: Tensor, dots_NM: Tensor, weights_NM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the derivatives by the logits, those by rows, columns and scale."""
    return (
        (scale * (weights_NM @ _wide(columns_MD))).to(rows_ND.dtype),
        (scale * (weights_NM.T @ _wide(rows_ND))).to(rows_ND.dtype),
        (weights_NM * dots_NM).sum().reshape(1),
    )


def _share(logits_NM: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The derivative of a log-sum-exp by its logits, times its gradient."""
    return ((logits_NM - lse).exp() * grad).masked_fill(lse == float("-inf"), 0.0)


def _signs(like_NM: Tensor, first_column: int) -> Tensor:
    """1 for a match and -1 for others."""
    signs_NM = -torch.ones_like(like_NM)
    _matching(signs_NM, first_column)[:] = 1.0
    return signs_NM


def _wide(features: Tensor) -> Tensor:
    """bfloat16 factors are multiplied exactly in float32, as a tensor core does."""
    return features if features.dtype == torch.float64 else features.float()


def _matching(pairs_NM: Tensor, first_column: int) -> Tensor:
    """The pairs that match, in order, as a view."""
    return pairs_NM.diagonal(nearest(first_column, *pairs_NM.shape))


def _before(first_column: int, n: int) -> int:
    """Rows before the first that can have a match."""
    return min(max(-first_column, 0), n)


def nearest(first_column: int, n: int, m: int) -> int:
    """The one nearest to 0 with the same matches: none at -n and below, none at m and above."""
    return max(-n, min(first_column, m))


def _kept(
    first_column: int, row_ids_N: Tensor | None, column_ids_M: Tensor | None
) -> Tensor | None:
    """False for pairs that are left out: equal ids, yet no match."""
    if row_ids_N is None or column_ids_M is None:
        return None
    equal_NM = (row_ids_N[:, None] == column_ids_M) & (row_ids_N[:, None] >= 0)
    match_NM = torch.zeros_like(equal_NM)
    _matching(match_NM, first_column)[:] = True
    return ~equal_NM | match_NM


def cost(n: int, m: int, d: int, dtype: torch.dtype, *, backward: bool) -> Cost:
    """One product forward; backward the logits again and one product for each side's gradient.

    Features are read once and gradients written once; nothing of size n x m is moved.
    """
    products = 3 if backward else 1
    return Cost(
        flops=2.0 * n * m * d * products,
        size_bytes=float((n + m) * d * dtype.itemsize * (2 if backward else 1)),
    )

"""The contrastive ops' Triton kernels: a tile of the logits is a product, and what follows its
epilogue. Exponentials are powers of two.
Status: compile for sm_90 and run in Triton's interpreter; not run on a GPU yet.

Suffixes: N rows, M columns, K dims of a tile.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEFT_OUT = tl.constexpr(float("-inf"))
SMALLEST_SUM = tl.constexpr(1e-30)  # exponentials that flush to zero are no loss beside it


@triton.jit
def _dots(
    rows, columns, at_N, at_M, n, m, dims, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """One tile of rows @ columns.T; past the edges zeros."""
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    at_K = tl.arange(0, BK)
    for k in range(0, dims, BK):
        in_dims = at_K + k < dims
        x = tl.load(
            rows + at_N[:, None].to(tl.int64) * dims + (k + at_K)[None, :],
            mask=(at_N < n)[:, None] & in_dims[None, :],
            other=0.0,
        )
        y = tl.load(
            columns + at_M[None, :].to(tl.int64) * dims + (k + at_K)[:, None],
            mask=(at_M < m)[None, :] & in_dims[:, None],
            other=0.0,
        )
        sums = tl.dot(x, y, sums, input_precision="ieee")
    return sums


@triton.jit
def _kept(row_ids, column_ids, at_N, at_M, n, m, first_column, WITH_IDS: tl.constexpr):
    """Pairs that count: inside the edges, and no false negatives."""
    kept = (at_N < n)[:, None] & (at_M < m)[None, :]
    if WITH_IDS:
        ids_N = tl.load(row_ids + at_N, mask=at_N < n, other=-1)
        ids_M = tl.load(column_ids + at_M, mask=at_M < m, other=-2)
        equal = (ids_N[:, None] == ids_M[None, :]) & (ids_N >= 0)[:, None]
        match = at_M[None, :] == (at_N + first_column)[:, None]
        kept = kept & (match | (equal == 0))
    return kept


@triton.jit
def _merge(shift, total, new_shift, new_total):
    """Adds sums of powers of two with one shift to what was summed with another."""
    largest = tl.maximum(shift, new_shift)
    safe = tl.where(largest == LEFT_OUT, 0.0, largest)
    return largest, total * tl.exp2(shift - safe) + new_total * tl.exp2(new_shift - safe)


@triton.jit
def reduce_pairs(
    rows, columns, scale, row_ids, column_ids,
    row_shifts, row_totals, column_shifts, column_totals, positive, row_sums, column_sums,
    n, m, dims, first_column, row_tiles, column_tiles,
    WITH_IDS: tl.constexpr, WITH_SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Shifts and totals of a row group by a column group, in powers of two."""
    row_group, column_group = tl.program_id(0), tl.program_id(1)
    factor = tl.load(scale)
    for row_tile in range(row_tiles):
        at_N = (row_group * row_tiles + row_tile) * BM + tl.arange(0, BM)
        shift_N = tl.full((BM,), LEFT_OUT, dtype=tl.float32)
        total_N = tl.zeros((BM,), dtype=tl.float32)
        sum_N = tl.zeros((BM,), dtype=tl.float32)
        match_N = tl.zeros((BM,), dtype=tl.float32)
        for column_tile in range(column_tiles):
            at_M = (column_group * column_tiles + column_tile) * BN + tl.arange(0, BN)
            logits = _dots(rows, columns, at_N, at_M, n, m, dims, BK, BM, BN) * factor
            kept = _kept(row_ids, column_ids, at_N, at_M, n, m, first_column, WITH_IDS)
            match = at_M[None, :] == (at_N + first_column)[:, None]
            match_N += tl.sum(tl.where(match & kept, logits, 0.0), 1)
            column_at = row_group.to(tl.int64) * m + at_M
            if WITH_SUMS:
                plain = tl.where(kept, logits, 0.0)
                sum_N += tl.sum(plain, 1)
                before = tl.load(column_sums + column_at, mask=at_M < m, other=0.0)
                tl.store(column_sums + column_at, before + tl.sum(plain, 0), mask=at_M < m)
            powers = tl.where(kept, logits * LOG2_E, LEFT_OUT)
            shift = tl.max(powers)
            safe = tl.where(shift == LEFT_OUT, 0.0, shift)
            values = tl.exp2(powers - safe)
            tile_N, tile_M = tl.sum(values, 1), tl.sum(values, 0)
            shift_of_N = tl.zeros((BM,), dtype=tl.float32) + shift
            shift_of_M = tl.zeros((BN,), dtype=tl.float32) + shift
            least_N = tl.min(tl.where(at_N < n, tile_N, 1.0))
            least_M = tl.min(tl.where(at_M < m, tile_M, 1.0))
            if tl.minimum(least_N, least_M) < SMALLEST_SUM:
                shift_of_N = tl.max(powers, 1)
                shift_of_M = tl.max(powers, 0)
                safe_N = tl.where(shift_of_N == LEFT_OUT, 0.0, shift_of_N)
                safe_M = tl.where(shift_of_M == LEFT_OUT, 0.0, shift_of_M)
                tile_N = tl.sum(tl.exp2(powers - safe_N[:, None]), 1)
                tile_M = tl.sum(tl.exp2(powers - safe_M[None, :]), 0)
            shift_N, total_N = _merge(shift_N, total_N, shift_of_N, tile_N)
            shift_M = tl.load(column_shifts + column_at, mask=at_M < m, other=LEFT_OUT)
            total_M = tl.load(column_totals + column_at, mask=at_M < m, other=0.0)
            shift_M, total_M = _merge(shift_M, total_M, shift_of_M, tile_M)
            tl.store(column_shifts + column_at, shift_M, mask=at_M < m)
            tl.store(column_totals + column_at, total_M, mask=at_M < m)
        row_at = column_group.to(tl.int64) * n + at_N
        tl.store(row_shifts + row_at, shift_N, mask=at_N < n)
        tl.store(row_totals + row_at, total_N, mask=at_N < n)
        tl.store(positive + row_at, match_N, mask=at_N < n)
        if WITH_SUMS:
            tl.store(row_sums + row_at, sum_N, mask=at_N < n)


@triton.jit
def _softplus(x):
    """log(1 + u) = 2 atanh(u / (2 + u)): exact for small u too, of which a row has thousands."""
    u = tl.exp2(-tl.abs(x) * LOG2_E)
    y = u / (u + 2.0)
    square = y * y
    series = 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    return tl.maximum(x, 0.0) + 2.0 * y * (series * square + 1.0)


@triton.jit
def sigmoid_losses(
    rows, columns, scale, bias, row_ids, column_ids, losses,
    n, m, dims, first_column, column_tiles,
    WITH_IDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Per row, the sum over a column group of softplus(-z l)."""
    row_tile, column_group = tl.program_id(0), tl.program_id(1)
    factor, shift = tl.load(scale), tl.load(bias)
    at_N = row_tile * BM + tl.arange(0, BM)
    loss_N = tl.zeros((BM,), dtype=tl.float32)
    for column_tile in range(column_tiles):
        at_M = (column_group * column_tiles + column_tile) * BN + tl.arange(0, BN)
        logits = _dots(rows, columns, at_N, at_M, n, m, dims, BK, BM, BN) * factor + shift
        kept = _kept(row_ids, column_ids, at_N, at_M, n, m, first_column, WITH_IDS)
        match = at_M[None, :] == (at_N + first_column)[:, None]
        loss_N += tl.sum(tl.where(kept, _softplus(tl.where(match, -logits, logits)), 0.0), 1)
    tl.store(losses + column_group.to(tl.int64) * n + at_N, loss_N, mask=at_N < n)


@triton.jit
def softmax_weights(
    rows, columns, scale, row_ids, column_ids, row_lse, column_lse,
    row_lse_grad, column_lse_grad, positive_grad, row_sum_grad, column_sum_grad,
    weights, weighted, first_row, first_column_at, n, m, dims, first_column, width,
    WITH_IDS: tl.constexpr, WITH_SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The derivative by the logits of a block of pairs (zeros past its edges), softmax form."""
    factor = tl.load(scale)
    at_N = first_row + tl.program_id(0) * BM + tl.arange(0, BM)
    at_M = first_column_at + tl.program_id(1) * BN + tl.arange(0, BN)
    dots = _dots(rows, columns, at_N, at_M, n, m, dims, BK, BM, BN)
    kept = _kept(row_ids, column_ids, at_N, at_M, n, m, first_column, WITH_IDS)
    powers = tl.where(kept, dots * (factor * LOG2_E), LEFT_OUT)
    lse_N = tl.load(row_lse + at_N, mask=at_N < n, other=0.0) * LOG2_E
    lse_M = tl.load(column_lse + at_M, mask=at_M < m, other=0.0) * LOG2_E
    grad_N = tl.load(row_lse_grad + at_N, mask=at_N < n, other=0.0)
    grad_M = tl.load(column_lse_grad + at_M, mask=at_M < m, other=0.0)
    # Where a log-sum-exp is -inf all its powers are: the two must not meet.
    lse_N = tl.where(lse_N == LEFT_OUT, 0.0, lse_N)
    lse_M = tl.where(lse_M == LEFT_OUT, 0.0, lse_M)
    by_row = tl.exp2(tl.minimum(powers - lse_N[:, None], 60.0)) * grad_N[:, None]
    by_column = tl.exp2(tl.minimum(powers - lse_M[None, :], 60.0)) * grad_M[None, :]
    values = by_row + by_column
    if WITH_SUMS:
        sum_N = tl.load(row_sum_grad + at_N, mask=at_N < n, other=0.0)
        sum_M = tl.load(column_sum_grad + at_M, mask=at_M < m, other=0.0)
        values += tl.where(kept, sum_N[:, None] + sum_M[None, :], 0.0)
    match = (at_M[None, :] == (at_N + first_column)[:, None]) & kept
    match_N = tl.load(positive_grad + at_N, mask=at_N < n, other=0.0)
    values += tl.where(match, match_N[:, None], 0.0)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(weighted + tile, tl.sum(values * dots))
    _store_weights(weights, values, width, BM, BN)


@triton.jit
def sigmoid_weights(
    rows, columns, scale, bias, row_ids, column_ids, row_loss_grad,
    weights, weighted, totals, first_row, first_column_at, n, m, dims, first_column, width,
    WITH_IDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same in the sigmoid form, and the sum of the derivatives, which is that by the bias."""
    factor, shift = tl.load(scale), tl.load(bias)
    at_N = first_row + tl.program_id(0) * BM + tl.arange(0, BM)
    at_M = first_column_at + tl.program_id(1) * BN + tl.arange(0, BN)
    dots = _dots(rows, columns, at_N, at_M, n, m, dims, BK, BM, BN)
    kept = _kept(row_ids, column_ids, at_N, at_M, n, m, first_column, WITH_IDS)
    match = at_M[None, :] == (at_N + first_column)[:, None]
    logits = dots * factor + shift
    signed = tl.where(match, -logits, logits)
    grad_N = tl.load(row_loss_grad + at_N, mask=at_N < n, other=0.0)
    values = tl.where(kept, tl.sigmoid(signed), 0.0) * grad_N[:, None]
    values = tl.where(match, -values, values)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(weighted + tile, tl.sum(values * dots))
    tl.store(totals + tile, tl.sum(values))
    _store_weights(weights, values, width, BM, BN)


@triton.jit
def _store_weights(weights, values, width, BM: tl.constexpr, BN: tl.constexpr):
    to_N = tl.program_id(0) * BM + tl.arange(0, BM)
    to_M = tl.program_id(1) * BN + tl.arange(0, BN)
    at = to_N[:, None].to(tl.int64) * width + to_M[None, :]
    tl.store(weights + at, values.to(weights.dtype.element_ty))

"""The contrastive ops in Triton: logits live in registers, tile by tile, as an epilogue of a
product.

Forward: a grid of row groups x column groups; a program goes over its tiles and keeps what its rows
and its columns sum to in memory of its own (groups x N and groups x M values), so there are no
atomics and results repeat. One exponential a pair serves both directions, shifted by the tile's
largest logit; where a sum gets too small for that, the tile takes each row's and column's own.
Backward: per block of pairs that fits the second-level cache, one kernel writes the derivative by
the logits in the features' dtype and two plain products turn it into gradients: three products in
all. Accumulation in float32.
Status: compiles for sm_90 and runs in Triton's interpreter; not run on a GPU yet.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from carillon.kernels.compile_report import CompileCase
from carillon.kernels.contrastive.reference import PairReductions, check

# A block of pairs in the backward pass: 4096 x 2048 bfloat16 are 16 MiB, a third of the cache.
ROW_BLOCK, COLUMN_BLOCK = 4096, 2048
NUM_PROGRAMS = 132 * 2  # two for each multiprocessor of an H100
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEFT_OUT = tl.constexpr(float("-inf"))
SMALLEST_SUM = tl.constexpr(1e-30)  # exponentials that flush to zero are no loss beside it


class Tiles(NamedTuple):
    """Rows, columns and dims of a tile, and how a program is built."""

    rows: int
    columns: int
    dims: int
    num_warps: int
    num_stages: int


def tiles_for(dtype: torch.dtype, *, with_extras: bool = False) -> Tiles:
    """Narrower where ids or sums take registers beside the logits.

    float32 products run at a tensor core's tf32 rate only if rounded: they are kept exact.
    """
    if dtype == torch.bfloat16:
        columns = 64 if with_extras else 128
        return Tiles(rows=128, columns=columns, dims=64, num_warps=8, num_stages=3)
    return Tiles(rows=64, columns=64, dims=32, num_warps=4, num_stages=2)


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
def _reduce(
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
def _sigmoid_losses(
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
def _weights(
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
    # A column without a gradient may have any log-sum-exp, -inf included: its power is cut.
    by_row = tl.exp2(tl.minimum(powers - lse_N[:, None], 60.0)) * grad_N[:, None]
    lse_M = tl.where(grad_M == 0.0, 0.0, lse_M)
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
def _sigmoid_weights(
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


class _Groups(NamedTuple):
    """How a forward grid shares out the tiles: groups of each side, and tiles in each."""

    rows: int
    columns: int
    row_tiles: int
    column_tiles: int


def _groups(n: int, m: int, tiles: Tiles) -> _Groups:
    """Row groups first; columns are split only where rows alone do not fill the chip."""
    row_tiles, column_tiles = triton.cdiv(n, tiles.rows), triton.cdiv(m, tiles.columns)
    row_groups = max(1, min(row_tiles, NUM_PROGRAMS))
    in_row_group = triton.cdiv(row_tiles, row_groups)
    row_groups = max(1, triton.cdiv(row_tiles, max(in_row_group, 1)))
    column_groups = max(1, min(column_tiles, NUM_PROGRAMS // row_groups))
    in_column_group = triton.cdiv(column_tiles, column_groups)
    column_groups = max(1, triton.cdiv(column_tiles, max(in_column_group, 1)))
    return _Groups(row_groups, column_groups, in_row_group, in_column_group)


def _lse(shifts: Tensor, totals: Tensor) -> Tensor:
    """Over the groups: shifts and totals are of powers of two. An empty total is -inf."""
    return torch.logsumexp((shifts + totals.log2()) * LN_2.value, 0)


def contrastive(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    first_column: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    with_sums: bool = False,
) -> tuple[Tensor, ...]:
    """As the reference."""
    check(rows, columns, scale, None, first_column, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    tiles = tiles_for(rows.dtype, with_extras=row_ids is not None or with_sums)
    groups = _groups(n, m, tiles)
    like = rows.new_empty(0, dtype=torch.float32)
    if n == 0:
        nothing, sums = like.new_full((m,), LEFT_OUT.value), like.new_zeros(m if with_sums else 0)
        return PairReductions(like, nothing, like.clone(), like.clone(), sums)
    by_row = [like.new_empty((groups.columns, n)) for _ in range(4)]
    row_shifts, row_totals, positive, row_sums = by_row
    column_shifts = like.new_full((groups.rows, m), LEFT_OUT.value)
    column_totals = torch.zeros_like(column_shifts)
    column_sums = torch.zeros_like(column_shifts) if with_sums else column_totals
    _reduce[(groups.rows, groups.columns)](
        rows.contiguous(), columns.contiguous(), scale, *_ids(row_ids, column_ids, rows),
        row_shifts, row_totals, column_shifts, column_totals, positive, row_sums, column_sums,
        n, m, dims, first_column, groups.row_tiles, groups.column_tiles,
        WITH_IDS=row_ids is not None, WITH_SUMS=with_sums, **_meta(tiles),
    )  # fmt: skip
    return PairReductions(
        _lse(row_shifts, row_totals),
        _lse(column_shifts, column_totals),
        positive.sum(0),
        row_sums.sum(0) if with_sums else like.clone(),
        column_sums.sum(0) if with_sums else like.clone(),
    )


def contrastive_sigmoid(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_column: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
) -> Tensor:
    """As the reference."""
    check(rows, columns, scale, bias, first_column, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    tiles = tiles_for(rows.dtype, with_extras=row_ids is not None)
    row_tiles, column_tiles = triton.cdiv(n, tiles.rows), triton.cdiv(m, tiles.columns)
    if n == 0:
        return rows.new_zeros(0, dtype=torch.float32)
    num_groups = max(1, min(column_tiles, NUM_PROGRAMS // row_tiles))
    in_group = triton.cdiv(column_tiles, num_groups)
    losses = rows.new_empty((triton.cdiv(column_tiles, in_group), n), dtype=torch.float32)
    _sigmoid_losses[(row_tiles, len(losses))](
        rows.contiguous(), columns.contiguous(), scale, bias, *_ids(row_ids, column_ids, rows),
        losses, n, m, dims, first_column, in_group,
        WITH_IDS=row_ids is not None, **_meta(tiles),
    )  # fmt: skip
    return losses.sum(0)


class _Gradients:
    """The backward pass over blocks of pairs: a kernel writes a block of weights, two products add
    its share to the gradients."""

    def __init__(self, rows: Tensor, columns: Tensor, *, with_extras: bool) -> None:
        self.rows, self.columns = rows.contiguous(), columns.contiguous()
        self.tiles = tiles_for(rows.dtype, with_extras=with_extras)
        self.by_rows = torch.zeros_like(self.rows, dtype=torch.float32)
        self.by_columns = torch.zeros_like(self.columns, dtype=torch.float32)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, tuple[int, int]]]:
        """Rows and columns of each block, its weights to be written, and the grid to write them."""
        n, m, tiles = len(self.rows), len(self.columns), self.tiles
        height = min(ROW_BLOCK, triton.cdiv(n, tiles.rows) * tiles.rows)
        width = min(COLUMN_BLOCK, triton.cdiv(m, tiles.columns) * tiles.columns)
        weights = self.rows.new_empty((height, width))
        for column in range(0, m, COLUMN_BLOCK):
            for row in range(0, n, ROW_BLOCK):
                of_rows, of_columns = slice(row, row + height), slice(column, column + width)
                num_rows, num_columns = len(self.rows[of_rows]), len(self.columns[of_columns])
                grid = triton.cdiv(num_rows, tiles.rows), triton.cdiv(num_columns, tiles.columns)
                yield of_rows, of_columns, weights, grid
                block = weights[:num_rows, :num_columns]
                _add_product(self.by_rows[of_rows], block, self.columns[of_columns])
                _add_product(self.by_columns[of_columns], block.T, self.rows[of_rows])

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.rows.dtype
        return (self.by_rows * scale).to(dtype), (self.by_columns * scale).to(dtype)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left @ right, summed in float32."""
    if to.is_cuda and left.dtype == torch.bfloat16:
        to += torch.mm(left, right, out_dtype=torch.float32)
    else:
        to.addmm_(left.float(), right.float())


def contrastive_backward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    first_column: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    row_lse_grad: Tensor,
    column_lse_grad: Tensor,
    positive_grad: Tensor,
    row_sum_grad: Tensor | None,
    column_sum_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rows, columns and scale."""
    check(rows, columns, scale, None, first_column, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    work = _Gradients(rows, columns, with_extras=row_ids is not None or row_sum_grad is not None)
    by_scale = rows.new_zeros(1, dtype=torch.float32)
    given = (row_lse, column_lse, row_lse_grad, column_lse_grad, positive_grad)
    sums = (row_sum_grad, column_sum_grad) if row_sum_grad is not None else given[:2]
    vectors = [value.contiguous() for value in (*given, *sums) if value is not None]
    for of_rows, of_columns, weights, grid in work.blocks():
        weighted = rows.new_empty(grid, dtype=torch.float32)
        _weights[grid](
            work.rows, work.columns, scale, *_ids(row_ids, column_ids, rows), *vectors,
            weights, weighted, of_rows.start, of_columns.start, n, m, dims, first_column,
            weights.shape[1],
            WITH_IDS=row_ids is not None, WITH_SUMS=row_sum_grad is not None, **_meta(work.tiles),
        )  # fmt: skip
        by_scale += weighted.sum()
    return (*work.finish(scale), by_scale)


def contrastive_sigmoid_backward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_column: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_loss_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by rows, columns, scale and bias."""
    check(rows, columns, scale, bias, first_column, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    work = _Gradients(rows, columns, with_extras=row_ids is not None)
    by_scale = rows.new_zeros(1, dtype=torch.float32)
    by_bias = torch.zeros_like(by_scale)
    for of_rows, of_columns, weights, grid in work.blocks():
        weighted = rows.new_empty(grid, dtype=torch.float32)
        totals = torch.empty_like(weighted)
        _sigmoid_weights[grid](
            work.rows, work.columns, scale, bias, *_ids(row_ids, column_ids, rows),
            row_loss_grad.contiguous(), weights, weighted, totals,
            of_rows.start, of_columns.start, n, m, dims, first_column, weights.shape[1],
            WITH_IDS=row_ids is not None, **_meta(work.tiles),
        )  # fmt: skip
        by_scale += weighted.sum()
        by_bias += totals.sum()
    return (*work.finish(scale), by_scale, by_bias)


def _ids(row_ids: Tensor | None, column_ids: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Any tensor stands for ids that are not there: the kernel does not read it."""
    if row_ids is None or column_ids is None:
        return like, like
    return row_ids.contiguous(), column_ids.contiguous()


def _meta(tiles: Tiles) -> dict[str, int]:
    return {
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BK": tiles.dims,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


IMPLEMENTS: dict[str, Callable[..., Any]] = {
    "contrastive": contrastive,
    "contrastive_backward": contrastive_backward,
    "contrastive_sigmoid": contrastive_sigmoid,
    "contrastive_sigmoid_backward": contrastive_sigmoid_backward,
}

_FEATURES = ("rows", "columns", "weights")
_IDS = ("row_ids", "column_ids")
_SIZES = (
    *("n", "m", "dims", "first_column", "row_tiles", "column_tiles", "width"),
    *("first_row", "first_column_at"),
)


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel at the tiles of both dtypes, bare and with ids and sums."""
    for kernel in (_reduce, _sigmoid_losses, _weights, _sigmoid_weights):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for extras in (False, True):
                meta = _meta(tiles_for(dtype, with_extras=extras))
                warps, stages = meta.pop("num_warps"), meta.pop("num_stages")
                flags = {flag: extras for flag in kernel.arg_names if flag.startswith("WITH_")}
                yield CompileCase(
                    name=f"{kernel.__name__}<{name}{', extras' if extras else ''}>",
                    kernel=kernel,
                    signature=_signature(kernel.arg_names, name, meta | flags),
                    constexprs=meta | flags,
                    num_warps=warps,
                    num_stages=stages,
                    divisible=("dims", "width"),
                )


def _signature(arguments: list[str], name: str, constexprs: dict[str, Any]) -> dict[str, str]:
    types = dict.fromkeys(_FEATURES, f"*{name}") | dict.fromkeys(_IDS, "*i64")
    types |= dict.fromkeys(_SIZES, "i32")
    return {one: types.get(one, "*fp32") for one in arguments if one not in constexprs}

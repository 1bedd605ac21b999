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

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from carillon.kernels.compile_report import CompileCase
from carillon.kernels.contrastive.check import check, check_both, check_vectors
from carillon.kernels.contrastive.reference import PairReductions, nearest
from carillon.kernels.contrastive.triton_kernels import (
    reduce_pairs,
    sigmoid_losses,
    sigmoid_weights,
    softmax_weights,
)

# A block of pairs in the backward pass: 4096 x 2048 bfloat16 are 16 MiB, a third of the cache.
ROW_BLOCK, COLUMN_BLOCK = 4096, 2048
NUM_PROGRAMS = 132 * 2  # two for each multiprocessor of an H100


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
    return torch.logsumexp((shifts + totals.log2()) * math.log(2), 0)


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
    check("contrastive", rows, columns, scale, None, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    tiles = tiles_for(rows.dtype, with_extras=row_ids is not None or with_sums)
    groups = _groups(n, m, tiles)
    like = rows.new_empty(0, dtype=torch.float32)
    if n == 0 or m == 0:
        row_lse, column_lse = (like.new_full((count,), -math.inf) for count in (n, m))
        row_sum, column_sum = (like.new_zeros(count if with_sums else 0) for count in (n, m))
        return PairReductions(row_lse, column_lse, like.new_zeros(n), row_sum, column_sum)
    by_row = [like.new_empty((groups.columns, n)) for _ in range(4)]
    row_shifts, row_totals, positive, row_sums = by_row
    column_shifts = like.new_full((groups.rows, m), -math.inf)
    column_totals = torch.zeros_like(column_shifts)
    column_sums = torch.zeros_like(column_shifts) if with_sums else column_totals
    reduce_pairs[(groups.rows, groups.columns)](
        rows.contiguous(), columns.contiguous(), scale, *_ids(row_ids, column_ids, rows),
        row_shifts, row_totals, column_shifts, column_totals, positive, row_sums, column_sums,
        n, m, dims, nearest(first_column, n, m), groups.row_tiles, groups.column_tiles,
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
    check("contrastive_sigmoid", rows, columns, scale, bias, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    tiles = tiles_for(rows.dtype, with_extras=row_ids is not None)
    row_tiles, column_tiles = triton.cdiv(n, tiles.rows), triton.cdiv(m, tiles.columns)
    if n == 0 or m == 0:
        return rows.new_zeros(n, dtype=torch.float32)
    num_groups = max(1, min(column_tiles, NUM_PROGRAMS // row_tiles))
    in_group = triton.cdiv(column_tiles, num_groups)
    losses = rows.new_empty((triton.cdiv(column_tiles, in_group), n), dtype=torch.float32)
    sigmoid_losses[(row_tiles, len(losses))](
        rows.contiguous(), columns.contiguous(), scale, bias, *_ids(row_ids, column_ids, rows),
        losses, n, m, dims, nearest(first_column, n, m), in_group,
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
    op = "contrastive_backward"
    check(op, rows, columns, scale, None, row_ids, column_ids)
    (n, dims), m = rows.shape, len(columns)
    check_vectors(
        op, rows, n, row_lse=row_lse, row_lse_grad=row_lse_grad, positive_grad=positive_grad,
        row_sum_grad=row_sum_grad,
    )  # fmt: skip
    check_vectors(
        op, rows, m, column_lse=column_lse, column_lse_grad=column_lse_grad,
        column_sum_grad=column_sum_grad,
    )  # fmt: skip
    check_both(op, row_sum_grad, column_sum_grad)
    work = _Gradients(rows, columns, with_extras=row_ids is not None or row_sum_grad is not None)
    by_scale = rows.new_zeros(1, dtype=torch.float32)
    given = (row_lse, column_lse, row_lse_grad, column_lse_grad, positive_grad)
    sums = (row_sum_grad, column_sum_grad) if row_sum_grad is not None else given[:2]
    vectors = [value.contiguous() for value in (*given, *sums) if value is not None]
    for of_rows, of_columns, weights, grid in work.blocks():
        weighted = rows.new_empty(grid, dtype=torch.float32)
        softmax_weights[grid](
            work.rows, work.columns, scale, *_ids(row_ids, column_ids, rows), *vectors,
            weights, weighted, of_rows.start, of_columns.start, n, m, dims,
            nearest(first_column, n, m), weights.shape[1],
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
    op = "contrastive_sigmoid_backward"
    check(op, rows, columns, scale, bias, row_ids, column_ids)
    check_vectors(op, rows, len(rows), row_loss_grad=row_loss_grad)
    (n, dims), m = rows.shape, len(columns)
    work = _Gradients(rows, columns, with_extras=row_ids is not None)
    by_scale = rows.new_zeros(1, dtype=torch.float32)
    by_bias = torch.zeros_like(by_scale)
    for of_rows, of_columns, weights, grid in work.blocks():
        weighted = rows.new_empty(grid, dtype=torch.float32)
        totals = torch.empty_like(weighted)
        sigmoid_weights[grid](
            work.rows, work.columns, scale, bias, *_ids(row_ids, column_ids, rows),
            row_loss_grad.contiguous(), weights, weighted, totals,
            of_rows.start, of_columns.start, n, m, dims, nearest(first_column, n, m),
            weights.shape[1],
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
    for kernel in (reduce_pairs, sigmoid_losses, softmax_weights, sigmoid_weights):
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

"""grouped_mm and gather_grouped_mm in Triton: one launch over the tiles of all experts.

A program finds its expert from the offsets, so nothing waits for the device: the grid has as many
tiles as any split of the rows needs, and those that are left over end at once. The rows after the
last segment are tiles of an expert more, which writes zeros. With GATHER the rows of the left
factor are fetched by token while loading, so no permuted copy exists.
Offsets are held within 0..R; a slot that names no token reads as zeros.
Status: compiled for sm_90 and run in the interpreter; not run on a GPU yet.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Sizes of one program's tile, and how it runs."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Tensor cores of sm_90 take 64 rows a warp group. Few rows an expert: less is wasted on the last
# tile by a small one. float32 multiplies in full precision, without tensor cores.
LARGE = Tile(128, 256, 64, num_warps=8, num_stages=3)
NARROW = Tile(128, 128, 64, num_warps=8, num_stages=4)
SMALL = Tile(64, 128, 64, num_warps=4, num_stages=4)
FLOAT32 = Tile(64, 64, 32, num_warps=4, num_stages=3)
# Of zero_tail: as a rule the tail is one padded segment or none.
TAIL_ROWS, TAIL_COLUMNS, TAIL_PROGRAMS = 4, 1024, 64
GROUP_TILES = 8  # of rows, that share a column of weights in the second-level cache


@triton.jit
def segment(offsets_ptr, entries, num_experts, num_rows):
    """Begin and end of each expert's rows, and of the rest as one expert more."""
    begin = tl.load(offsets_ptr + entries, mask=entries <= num_experts, other=0)
    end = tl.load(offsets_ptr + entries + 1, mask=entries < num_experts, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), num_rows)
    end = tl.where(entries == num_experts, num_rows, tl.minimum(end, num_rows))
    return begin, tl.where(entries <= num_experts, tl.maximum(end, begin), begin)


@triton.jit
def rows_to_load(row_to_slot_ptr, rows, in_segment, num_tokens, k, GATHER: tl.constexpr):
    """Which row of x stands in each row, and whether one does."""
    if GATHER:
        slots = tl.load(row_to_slot_ptr + rows, mask=in_segment, other=-1)
        tokens = slots // k
        filled = in_segment & (slots >= 0) & (tokens < num_tokens)
        return tl.where(filled, tokens, 0).to(tl.int64), filled
    else:
        return rows.to(tl.int64), in_segment


@triton.jit
def grouped_kernel(
    x_ptr, weights_ptr, offsets_ptr, row_to_slot_ptr, out_ptr,
    num_rows, num_tokens, k, num_experts, out_width, num_tiles,
    stride_e, stride_d, stride_f,
    WIDTH: tl.constexpr, GATHER: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(out_width, BLOCK_N)
    group = tl.program_id(0) // (GROUP * num_columns)
    in_group = tl.program_id(0) % (GROUP * num_columns)
    height = tl.minimum(num_tiles - group * GROUP, GROUP)
    tile = group * GROUP + in_group % height
    column = in_group // height

    entries = tl.arange(0, BLOCK_E)
    begins, ends = segment(offsets_ptr, entries, num_experts, num_rows)
    tiles = tl.cdiv(ends - begins, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), axis=0)
    if expert > num_experts:
        return
    first = tl.sum(tl.where(entries < expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(entries == expert, begins, 0), axis=0) + (tile - first) * BLOCK_M
    end = tl.sum(tl.where(entries == expert, ends, 0), axis=0)

    rows = begin + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_segment = rows < end
    in_columns = columns < out_width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if expert < num_experts:
        sources, filled = rows_to_load(row_to_slot_ptr, rows, in_segment, num_tokens, k, GATHER)
        depth = tl.arange(0, BLOCK_K)
        x_at = x_ptr + sources[:, None] * WIDTH + depth[None, :]
        w_at = weights_ptr + expert.to(tl.int64) * stride_e
        w_at += depth[:, None] * stride_d + columns[None, :].to(tl.int64) * stride_f
        for start in range(0, WIDTH, BLOCK_K):
            x_mask, w_mask = filled[:, None], in_columns[None, :]
            if not EVEN_D:
                x_mask = x_mask & (depth < WIDTH - start)[None, :]
                w_mask = w_mask & (depth < WIDTH - start)[:, None]
            x = tl.load(x_at, mask=x_mask, other=0.0)
            w = tl.load(w_at) if EVEN_D and EVEN_F else tl.load(w_at, mask=w_mask, other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K * stride_d
    to = out_ptr + rows.to(tl.int64)[:, None] * out_width + columns[None, :]
    mask = in_segment[:, None] & in_columns[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grad_weights_kernel(
    x_ptr, grad_ptr, offsets_ptr, row_to_slot_ptr, grad_weights_ptr,
    num_rows, num_tokens, k, width, out_width,
    GATHER: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    num_columns = tl.cdiv(out_width, BLOCK_N)
    depth = (tl.program_id(0) // num_columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.maximum(tl.load(offsets_ptr + expert), 0)
    end = tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows)
    in_depth, in_columns = depth < width, columns < out_width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        in_segment = rows < end
        sources, filled = rows_to_load(row_to_slot_ptr, rows, in_segment, num_tokens, k, GATHER)
        x_mask, grad_mask = filled[:, None], in_segment[:, None]
        if not EVEN_D:
            x_mask = x_mask & in_depth[None, :]
        if not EVEN_F:
            grad_mask = grad_mask & in_columns[None, :]
        x_at = x_ptr + sources[:, None] * width + depth[None, :]
        grad_at = grad_ptr + rows.to(tl.int64)[:, None] * out_width + columns[None, :]
        x = tl.load(x_at, mask=x_mask, other=0.0)
        grad = tl.load(grad_at, mask=grad_mask, other=0.0)
        total = tl.dot(tl.trans(x), grad, total, input_precision="ieee")
    to = grad_weights_ptr + expert * width * out_width
    to += depth.to(tl.int64)[:, None] * out_width + columns[None, :]
    mask = in_depth[:, None] & in_columns[None, :]
    tl.store(to, total.to(grad_weights_ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tail_kernel(
    offsets_ptr, out_ptr, num_experts, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Writes zeros from offsets[E] on and nothing else."""
    first = tl.load(offsets_ptr + num_experts)
    first = tl.minimum(tl.maximum(first, 0), num_rows)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    zeros = tl.zeros((BLOCK_R, BLOCK_D), out_ptr.dtype.element_ty)
    start = first + tl.program_id(0) * BLOCK_R
    for begin in range(start, num_rows, tl.num_programs(0) * BLOCK_R):
        rows = begin + tl.arange(0, BLOCK_R)
        to = out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(to, zeros, mask=(rows < num_rows)[:, None] & (columns < width)[None, :])


def zero_tail(out_RF: Tensor, offsets: Tensor) -> None:
    """Zeroes the rows from offsets[E] on in place, without waiting for the device to know them."""
    num_rows, width = out_RF.shape
    if out_RF.numel():
        columns = min(triton.next_power_of_2(width), TAIL_COLUMNS)
        grid = (min(triton.cdiv(num_rows, TAIL_ROWS), TAIL_PROGRAMS), triton.cdiv(width, columns))
        zero_tail_kernel[grid](
            offsets, out_RF, len(offsets) - 1, num_rows, width, BLOCK_R=TAIL_ROWS, BLOCK_D=columns
        )


def tile_of(dtype: torch.dtype, num_rows: int, num_experts: int, out_width: int) -> Tile:
    """By the mean number of rows an expert and by the width."""
    if dtype == torch.float32:
        return FLOAT32
    if num_rows < 96 * num_experts:
        return SMALL
    return LARGE if out_width >= 256 else NARROW


def multiply(
    x: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor | None = None,
    k: int = 1,
) -> Tensor:
    """x's rows, or those that `row_to_slot_R` names, times their expert's matrix."""
    num_experts, width, out_width = weights_EDF.shape
    num_rows = len(x) if row_to_slot_R is None else len(row_to_slot_R)
    out_RF = torch.empty(num_rows, out_width, dtype=x.dtype, device=x.device)
    if not out_RF.numel():
        return out_RF
    x, offsets = x.contiguous(), offsets.contiguous()
    tile = tile_of(x.dtype, num_rows, num_experts, out_width)
    # Each segment, the rest among them, ends in at most one tile that is not full.
    num_tiles = triton.cdiv(num_rows, tile.rows) + min(num_experts, num_rows)
    grouped_kernel[(num_tiles * triton.cdiv(out_width, tile.columns),)](
        x, weights_EDF, offsets, offsets if row_to_slot_R is None else row_to_slot_R.contiguous(),
        out_RF, num_rows, len(x), k, num_experts, out_width, num_tiles,
        *weights_EDF.stride(),
        WIDTH=width, GATHER=row_to_slot_R is not None, EVEN_D=width % tile.depth == 0,
        EVEN_F=out_width % tile.columns == 0, BLOCK_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=GROUP_TILES,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out_RF


def grad_weights(
    x: Tensor,
    grad_RF: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor | None = None,
    k: int = 1,
) -> Tensor:
    """The sum over each expert's rows of x^T grad."""
    num_experts, width, out_width = weights_EDF.shape
    out_EDF = torch.empty(weights_EDF.shape, dtype=x.dtype, device=x.device)
    if not out_EDF.numel():
        return out_EDF
    tile = FLOAT32 if x.dtype == torch.float32 else NARROW
    tiles = triton.cdiv(width, tile.rows) * triton.cdiv(out_width, tile.columns)
    grad_weights_kernel[(tiles, num_experts)](
        x.contiguous(), grad_RF.contiguous(), offsets.contiguous(),
        offsets if row_to_slot_R is None else row_to_slot_R.contiguous(), out_EDF,
        len(grad_RF), len(x), k, width, out_width,
        GATHER=row_to_slot_R is not None, EVEN_D=width % tile.rows == 0,
        EVEN_F=out_width % tile.columns == 0,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out_EDF

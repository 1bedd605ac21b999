"""moe_permute, moe_unpermute and their gradients in Triton: a program takes one token.

All are bound by memory, so each walks the tokens: a token's row is read once for its k copies, and
its k rows are added in registers, in the order of its slots. Rows that no slot fills are zeroed by
a second kernel that touches nothing else. A row outside 0..R-1 counts as dropped.
Status: compiled for sm_90 and run in the interpreter; not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
PADDING_ROWS = 16


@triton.jit
def permute_kernel(
    x_ptr, slot_to_row_ptr, rows_ptr, num_rows, width, K: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < width
    values = tl.load(x_ptr + token * width + columns, mask=in_row, other=0.0)
    for j in range(K):
        row = tl.load(slot_to_row_ptr + token * K + j)
        if (row >= 0) & (row < num_rows):
            tl.store(rows_ptr + row.to(tl.int64) * width + columns, values, mask=in_row)


@triton.jit
def zero_padding_kernel(
    row_to_slot_ptr, rows_ptr, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slots = tl.load(row_to_slot_ptr + rows, mask=rows < num_rows, other=0)
    empty = (rows < num_rows) & (slots < 0)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    zeros = tl.zeros((BLOCK_R, BLOCK_D), rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + at, zeros, mask=empty[:, None] & (columns < width)[None, :])


@triton.jit
def sum_kernel(
    rows_ptr, weights_ptr, slot_to_row_ptr, out_ptr, num_rows, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        row = tl.load(slot_to_row_ptr + token * K + j)
        kept = (row >= 0) & (row < num_rows)
        at = rows_ptr + row.to(tl.int64) * width + columns
        values = tl.load(at, mask=in_row & kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.where(kept, tl.load(weights_ptr + token * K + j), 0.0)
        total += values
    to = out_ptr + token * width + columns
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr, rows_ptr, weights_ptr, slot_to_row_ptr, grad_rows_ptr, grad_weights_ptr,
    num_rows, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for j in range(K):
        slot = token * K + j
        row = tl.load(slot_to_row_ptr + slot).to(tl.int64)
        kept = (row >= 0) & (row < num_rows)
        weight = tl.load(weights_ptr + slot)
        products = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            wanted = (columns < WIDTH) & kept
            # The token's gradient is read k times, from the first-level cache after the first.
            grad = tl.load(grad_ptr + token * WIDTH + columns, mask=wanted, other=0.0)
            values = tl.load(rows_ptr + row * WIDTH + columns, mask=wanted, other=0.0)
            products += grad.to(tl.float32) * values.to(tl.float32)
            scaled = grad.to(tl.float32) * weight
            to = grad_rows_ptr + row * WIDTH + columns
            tl.store(to, scaled.to(grad_rows_ptr.dtype.element_ty), mask=wanted)
        tl.store(grad_weights_ptr + slot, tl.sum(products, axis=0))


def block_of(width: int) -> int:
    return int(min(max(triton.next_power_of_2(width), 16), MAX_BLOCK))


def zero_padding(rows_RD: Tensor, row_to_slot_R: Tensor) -> None:
    num_rows, width = rows_RD.shape
    block = block_of(width)
    if rows_RD.numel():
        grid = (triton.cdiv(num_rows, PADDING_ROWS), triton.cdiv(width, block))
        zero_padding_kernel[grid](
            row_to_slot_R.contiguous(), rows_RD, num_rows, width,
            BLOCK_R=PADDING_ROWS, BLOCK_D=block,
        )  # fmt: skip


def permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    num_tokens, width = x_TD.shape
    rows_RD = torch.empty(len(row_to_slot_R), width, dtype=x_TD.dtype, device=x_TD.device)
    block = block_of(width)
    if x_TD.numel():
        permute_kernel[(num_tokens, triton.cdiv(width, block))](
            x_TD.contiguous(), slot_to_row_TK.contiguous(), rows_RD,
            len(rows_RD), width, K=slot_to_row_TK.shape[1], BLOCK_D=block,
        )  # fmt: skip
    zero_padding(rows_RD, row_to_slot_R)
    return rows_RD


def sum_rows(rows_RD: Tensor, weights_TK: Tensor | None, slot_to_row_TK: Tensor) -> Tensor:
    """The sum of each token's rows, by weights where they are given."""
    num_rows, width = rows_RD.shape
    num_tokens, k = slot_to_row_TK.shape
    out_TD = torch.empty(num_tokens, width, dtype=rows_RD.dtype, device=rows_RD.device)
    block = block_of(width)
    if out_TD.numel():
        sum_kernel[(num_tokens, triton.cdiv(width, block))](
            rows_RD.contiguous(), out_TD if weights_TK is None else weights_TK.contiguous(),
            slot_to_row_TK.contiguous(), out_TD, num_rows, width,
            K=k, WEIGHTED=weights_TK is not None, BLOCK_D=block,
        )  # fmt: skip
    return out_TD


def unpermute_backward(
    grad_TD: Tensor,
    rows_RD: Tensor,
    weights_TK: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    num_rows, width = rows_RD.shape
    num_tokens, k = slot_to_row_TK.shape
    rows_RD, weights_TK = rows_RD.contiguous(), weights_TK.contiguous()
    grad_rows_RD, grad_weights_TK = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
    if num_tokens:
        unpermute_backward_kernel[(num_tokens,)](
            grad_TD.contiguous(), rows_RD, weights_TK, slot_to_row_TK.contiguous(),
            grad_rows_RD, grad_weights_TK, num_rows, WIDTH=width, K=k, BLOCK_D=block_of(width),
        )  # fmt: skip
    zero_padding(grad_rows_RD, row_to_slot_R)
    return grad_rows_RD, grad_weights_TK

"""Inf-CL's algorithm in Triton, for CUDA: its order of work and its tiles, not its code.

As inf_cl.py, 20 N^2 D FLOPs: each direction by itself, three kernels of 64 x 64 tiles over TF32
products of float32 features. A gradient of 64 rows does not fit the registers, so it is added up in
memory, tile by tile. Not run on a GPU yet; right in Triton's interpreter.
Source: Cheng et al. 2024, Breaking the Memory Barrier (arXiv 2410.17243), section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
DEPTH = 64  # of the features at a time


def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Shapes: (N, D), (N, D), (1,) -> (), the mean of both directions' cross-entropy."""
    image, text = image.float(), text.float()
    return (_direction(image * scale, text) + _direction(text * scale, image)) / 2


def _direction(queries_ND: Tensor, keys_ND: Tensor) -> Tensor:
    losses: Tensor = _Direction.apply(queries_ND, keys_ND)
    return losses.mean()


class _Direction(torch.autograd.Function):
    """Cross-entropy of each query among all keys, where query i matches key i."""

    @staticmethod
    def forward(context: Any, queries_ND: Tensor, keys_ND: Tensor) -> Tensor:
        queries_ND, keys_ND = queries_ND.contiguous(), keys_ND.contiguous()
        num, dims = queries_ND.shape
        lse_N = queries_ND.new_empty(num)
        _lse[(triton.cdiv(num, TILE),)](queries_ND, keys_ND, lse_N, num, dims, TILE, DEPTH)
        context.save_for_backward(queries_ND, keys_ND, lse_N)
        return lse_N - (queries_ND * keys_ND).sum(1)

    @staticmethod
    def backward(context: Any, grad_N: Tensor) -> tuple[Tensor, Tensor]:
        queries_ND, keys_ND, lse_N = context.saved_tensors
        num, dims = queries_ND.shape
        grad_N = grad_N.contiguous()
        grad_queries = -grad_N[:, None] * keys_ND
        grad_keys = -grad_N[:, None] * queries_ND
        given = (queries_ND, keys_ND, lse_N, grad_N)
        grid = (triton.cdiv(num, TILE),)
        _add_grad_queries[grid](*given, grad_queries, num, dims, TILE, DEPTH)
        _add_grad_keys[grid](*given, grad_keys, num, dims, TILE, DEPTH)
        return grad_queries, grad_keys


@triton.jit
def _logits(
    queries, keys, rows, columns, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """One tile, -inf beyond the last key."""
    tile = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, dims, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth[None, :] < dims
        left = tl.load(
            queries + rows[:, None] * dims + depth[None, :], (rows[:, None] < num) & inside, 0.0
        )
        right = tl.load(
            keys + columns[:, None] * dims + depth[None, :], (columns[:, None] < num) & inside, 0.0
        )
        tile += tl.dot(left, tl.trans(right), input_precision="tf32")
    return tl.where(columns[None, :] < num, tile, float("-inf"))


@triton.jit
def _lse(queries, keys, lse, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr):
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    top = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, num, TILE):
        columns = (start + tl.arange(0, TILE)).to(tl.int64)
        tile = _logits(queries, keys, rows, columns, num, dims, TILE, DEPTH)
        higher = tl.maximum(top, tl.max(tile, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(tile - higher[:, None]), 1)
        top = higher
    tl.store(lse + rows, top + tl.log(total), rows < num)


@triton.jit
def _weights(
    queries, keys, lse, grad, rows, columns, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """The gradient of the logits of one tile, less the match; 0 beyond the last query."""
    tile = _logits(queries, keys, rows, columns, num, dims, TILE, DEPTH)
    lse_rows = tl.load(lse + rows, rows < num, float("inf"))
    return tl.exp(tile - lse_rows[:, None]) * tl.load(grad + rows, rows < num, 0.0)[:, None]


@triton.jit
def _add_product(
    weights, features, sums, taken, given, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Adds weights @ features[taken] to sums[given]."""
    for start in range(0, dims, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth[None, :] < dims
        right = tl.load(
            features + taken[:, None] * dims + depth[None, :], (taken[:, None] < num) & inside, 0.0
        )
        where = sums + given[:, None] * dims + depth[None, :]
        mask = (given[:, None] < num) & inside
        before = tl.load(where, mask, 0.0)
        tl.store(where, before + tl.dot(weights, right, input_precision="tf32"), mask)


@triton.jit
def _add_grad_queries(
    queries, keys, lse, grad, sums, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    for start in range(0, num, TILE):
        columns = (start + tl.arange(0, TILE)).to(tl.int64)
        weights = _weights(queries, keys, lse, grad, rows, columns, num, dims, TILE, DEPTH)
        _add_product(weights, keys, sums, columns, rows, num, dims, TILE, DEPTH)


@triton.jit
def _add_grad_keys(
    queries, keys, lse, grad, sums, num, dims, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    columns = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    for start in range(0, num, TILE):
        rows = (start + tl.arange(0, TILE)).to(tl.int64)
        weights = _weights(queries, keys, lse, grad, rows, columns, num, dims, TILE, DEPTH)
        _add_product(tl.trans(weights), queries, sums, rows, columns, num, dims, TILE, DEPTH)

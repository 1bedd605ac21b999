"""A linear layer whose three products take 8-bit floats, cast where they are used, from parameters
that stay in full precision. How they are scaled: fp8_scaling.py.

Left out: products of a share of a weight, which are engine/parallel/fp8.py.
Status: runs on CPU, where torch has no blockwise product and `_multiply` says what stands in for
it. Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carillon.engine.nn.fp8_scaling import Recipe, Role, Scaling
from carillon.kernels.fp8_cast.reference import dequantize

Codes = tuple[Tensor, Tensor]  # a matrix's 8-bit floats and their scales
UNIT = 16  # values along each side of a product, as tensor cores take them


class Fp8Linear(nn.Linear):
    """As nn.Linear, (..., in) -> (..., out), in bfloat16; the sums of its products are float32."""

    scaling: Scaling
    takes_fp8 = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes_fp8:
            return super().forward(x)
        y = multiply_fp8(x, self.weight, self.scaling)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def multiply_fp8(x: Tensor, weight_NK: Tensor, scaling: Scaling) -> Tensor:
    """x @ weight.T by 8-bit products: (..., K) -> (..., N), bfloat16."""
    rows_MK = x.reshape(-1, x.shape[-1])
    y_MN: Tensor = _Product.apply(rows_MK, weight_NK, scaling)  # type: ignore[no-untyped-call]
    return y_MN.reshape(*x.shape[:-1], len(weight_NK))


class _Product(torch.autograd.Function):
    """x (M, K) by weight (N, K): (M, N). The casts for the backward pass are made in the forward
    pass, from one read each, and are all that is kept."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, scaling: Scaling) -> Tensor:
        num_rows = len(x_MK)
        x = scaling.cast(whole_units(x_MK), Role.INPUT)
        weight = scaling.cast(weight_NK, Role.WEIGHT)
        ctx.save_for_backward(x.column, x.column_scale, weight.column, weight.column_scale)
        ctx.scaling, ctx.num_rows = scaling, num_rows
        ctx.dtypes = x_MK.dtype, weight_NK.dtype
        y_MN = _multiply(scaling.recipe, (x.row, x.row_scale), (weight.row, weight.row_scale))
        return y_MN[:num_rows]

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_column, x_scale, weight_column, weight_scale = ctx.saved_tensors
        recipe = ctx.scaling.recipe
        grad = ctx.scaling.cast(whole_units(grad_MN), Role.GRADIENT)
        x_dtype, weight_dtype = ctx.dtypes
        x_grad = weight_grad = None
        wants_x, wants_weight = _wanted(ctx)
        if wants_x:
            product = _multiply(recipe, (grad.row, grad.row_scale), (weight_column, weight_scale))
            x_grad = product[: ctx.num_rows].to(x_dtype)
        if wants_weight:
            product = _multiply(recipe, (grad.column, grad.column_scale), (x_column, x_scale))
            weight_grad = product.to(weight_dtype)
        return x_grad, weight_grad, None


def _wanted(ctx: Any) -> list[bool]:
    """Which of the gradients of x and weight this backward pass is for.

    A pipeline's zero-bubble schedule takes them in two passes, and `ctx.needs_input_grad` says the
    same in both.
    """
    if torch.compiler.is_compiling():  # never with such a schedule
        return [*ctx.needs_input_grad[:2]]
    return [_is_wanted(node) for node, _ in ctx.next_functions]


def _is_wanted(node: Any) -> bool:
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf, whose gradient alone was asked for: it cannot be told otherwise
        return True


def _multiply(recipe: Recipe, a: Codes, b: Codes) -> Tensor:
    """a (M, K) by b (N, K): a @ b.T, bfloat16, from codes and their scales.

    On a CPU the blocks of both are given their values back first and multiplied in float32: the
    same sum but for its order and its rounding to 24 bits.
    """
    (a_MK, a_scale), (b_NK, b_scale) = a, b
    if recipe == "blockwise" and a_MK.device.type == "cpu":
        return (dequantize(a_MK, a_scale) @ dequantize(b_NK, b_scale).t()).to(torch.bfloat16)
    b_scale = b_scale.t() if b_scale.dim() == 2 else b_scale
    return torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16
    )


def whole_units(x_MK: Tensor) -> Tensor:
    """Rows of zeros at the end, up to what a product takes; they change no scale."""
    missing = -len(x_MK) % UNIT
    return F.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK

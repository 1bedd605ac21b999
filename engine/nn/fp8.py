"""A linear layer whose three products take 8-bit floats: activations and weights in e4m3, gradients
in e5m2, each cast where it is used, from parameters that stay in full precision.

Source: Micikevicius et al. 2022 (FP8 formats for deep learning), sections 3 and 4.
Left out: delayed scaling and blockwise scales, whose products torch has on a GPU only.
Status: runs on CPU; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carillon.kernels.fp8_cast.reference import Fp8Copies
from carillon.kernels.table import resolve

Recipe = Literal["tensorwise", "rowwise"]
_UNIT = 16  # values along each side of a product, as tensor cores take them


class Fp8Linear(nn.Linear):
    """As nn.Linear, (..., in) -> (..., out), in bfloat16; the sums of its products are float32."""

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        y_MN: Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.recipe)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y_MN = y_MN + self.bias.to(y_MN.dtype)
        return y_MN.reshape(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """x (M, K) by weight (N, K): (M, N). The casts for the backward pass are made in the forward
    pass, from one read each, and are all that is kept."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
        num_rows = len(x_MK)
        x = _copies(_whole_units(x_MK), recipe, torch.float8_e4m3fn)
        weight = _copies(weight_NK, recipe, torch.float8_e4m3fn)
        ctx.save_for_backward(x.column, x.column_scale, weight.column, weight.column_scale)
        ctx.recipe, ctx.num_rows = recipe, num_rows
        ctx.dtypes = x_MK.dtype, weight_NK.dtype
        return _multiply(x.row, x.row_scale, weight.row, weight.row_scale)[:num_rows]

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor, None]:
        x_column, x_scale, weight_column, weight_scale = ctx.saved_tensors
        grad = _copies(_whole_units(grad_MN), ctx.recipe, torch.float8_e5m2)
        x_dtype, weight_dtype = ctx.dtypes
        x_grad = _multiply(grad.row, grad.row_scale, weight_column, weight_scale)[: ctx.num_rows]
        weight_grad = _multiply(grad.column, grad.column_scale, x_column, x_scale)
        return x_grad.to(x_dtype), weight_grad.to(weight_dtype), None


def _copies(x_MK: Tensor, recipe: Recipe, dtype: torch.dtype) -> Fp8Copies:
    if x_MK.dtype not in (torch.float32, torch.bfloat16):
        x_MK = x_MK.float()
    copies = resolve("fp8_cast", x_MK.device)(x_MK, recipe, dtype, column=True)
    return Fp8Copies(*copies)


def _multiply(a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor) -> Tensor:
    """a @ b.T in bfloat16; scales are () or one a row."""
    b_scale = b_scale.t() if b_scale.dim() == 2 else b_scale
    return torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16
    )


def _whole_units(x_MK: Tensor) -> Tensor:
    """Rows of zeros at the end, up to what a product takes; they change no scale."""
    missing = -len(x_MK) % _UNIT
    return F.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK


def to_fp8(blocks: Iterable[nn.Module], recipe: Recipe) -> None:
    """Make the linear layers of transformer blocks take 8-bit products, in place.

    Embeddings, norms, pools, projections and the loss keep their precision, and so does a layer
    whose sides are no multiples of 16.
    """
    for block in blocks:
        for module in block.modules():
            if type(module) is nn.Linear and not _odd(module):
                module.__class__ = Fp8Linear
                cast(Fp8Linear, module).recipe = recipe


def _odd(linear: nn.Linear) -> bool:
    return linear.in_features % _UNIT != 0 or linear.out_features % _UNIT != 0

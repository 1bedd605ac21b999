"""What torch.compile, autograd and opcheck must know of fp8_cast.

The copies are marked as not differentiable: they are operands of products, and the ops that
multiply them define the gradient (straight through, as a rule).
"""

from typing import Any

import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import new_scale
from carillon.kernels.fp8_cast.reference import check

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def register(namespace: str) -> None:
    """Registers the shape function; called once a namespace, after the op has been declared."""
    name = f"{namespace}::fp8_cast"
    torch.library.register_fake(name, shape)
    torch.library.register_autograd(name, _no_gradient, setup_context=_mark)


def shape(
    x_MK: Tensor,
    granularity: str,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    column: bool = False,
    power_of_two: bool = False,
    check_finite: bool = False,
) -> Outputs:
    check(x_MK, granularity, dtype, scale, power_of_two)
    return new_outputs(x_MK, granularity, dtype, column)


def new_outputs(x_MK: Tensor, granularity: str, dtype: torch.dtype, column: bool) -> Outputs:
    """Allocates row, row_scale, column, column_scale and amax."""
    m, k = x_MK.shape
    row_MK = x_MK.new_empty((m, k), dtype=dtype)
    row_scale = new_scale(x_MK, granularity, m, k)
    amax = x_MK.new_empty((), dtype=torch.float32)
    if column:
        column_scale = new_scale(x_MK, granularity, k, m)
        return row_MK, row_scale, x_MK.new_empty((k, m), dtype=dtype), column_scale, amax
    no_scale = x_MK.new_empty((0, 0), dtype=torch.float32)
    return row_MK, row_scale, x_MK.new_empty((0, 0), dtype=dtype), no_scale, amax


def _mark(ctx: Any, inputs: Any, output: Outputs, **_: Any) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *gradients: Any) -> None:
    """Is not reached: no output asks for a gradient."""

"""What torch.compile, opcheck and autograd must know of the contrastive ops."""

from typing import Any

import torch
from torch import Tensor

from carillon.kernels.contrastive.check import check
from carillon.kernels.second_derivative import refuse_second_derivative


def register(namespace: str) -> None:
    """Registers shape functions and autograd formulas; called once a namespace."""
    library = torch.library
    library.register_fake(f"{namespace}::contrastive", shapes)
    library.register_fake(f"{namespace}::contrastive_backward", backward_shapes)
    library.register_fake(f"{namespace}::contrastive_sigmoid", sigmoid_shape)
    library.register_fake(f"{namespace}::contrastive_sigmoid_backward", sigmoid_backward_shapes)
    ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_ids, column_ids, row_lse, column_lse = ctx.saved_tensors
        n, m = len(row_lse), len(column_lse)
        by_lse, by_column_lse, by_positive, by_sum, by_column_sum = grads
        gradients = ops.contrastive_backward(
            *(rows, columns, scale, ctx.first_column, row_ids, column_ids, row_lse, column_lse),
            _or_zeros(by_lse, n, row_lse),
            _or_zeros(by_column_lse, m, row_lse),
            _or_zeros(by_positive, n, row_lse),
            _or_zeros(by_sum, n, row_lse) if ctx.with_sums else None,
            _or_zeros(by_column_sum, m, row_lse) if ctx.with_sums else None,
        )
        return (*gradients, None, None, None, None)

    def sigmoid_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias, row_ids, column_ids = ctx.saved_tensors
        gradients = ops.contrastive_sigmoid_backward(
            rows, columns, scale, bias, ctx.first_column, row_ids, column_ids, grad
        )
        return (*gradients, None, None, None)

    library.register_autograd(f"{namespace}::contrastive", backward, setup_context=_keep)
    library.register_autograd(
        f"{namespace}::contrastive_sigmoid", sigmoid_backward, setup_context=_keep_sigmoid
    )
    refuse_second_derivative(namespace, "contrastive_backward", "contrastive_sigmoid_backward")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, scale, first_column, row_ids, column_ids, with_sums = inputs
    ctx.first_column, ctx.with_sums = first_column, with_sums
    ctx.save_for_backward(rows, columns, scale, row_ids, column_ids, output[0], output[1])


def _keep_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, columns, scale, bias, first_column, row_ids, column_ids = inputs
    ctx.first_column = first_column
    ctx.save_for_backward(rows, columns, scale, bias, row_ids, column_ids)


def _or_zeros(grad: Tensor | None, length: int, like: Tensor) -> Tensor:
    return like.new_zeros(length) if grad is None else grad


def shapes(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    first_column: int = 0,
    row_ids_N: Tensor | None = None,
    column_ids_M: Tensor | None = None,
    with_sums: bool = False,
) -> tuple[Tensor, ...]:
    check("contrastive", rows_ND, columns_MD, scale, None, row_ids_N, column_ids_M)
    n, m = rows_ND.shape[0], columns_MD.shape[0]
    lengths = (n, m, n, n if with_sums else 0, m if with_sums else 0)
    return tuple(rows_ND.new_empty(length, dtype=torch.float32) for length in lengths)


def backward_shapes(rows_ND: Tensor, columns_MD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        rows_ND.new_empty(rows_ND.shape),
        columns_MD.new_empty(columns_MD.shape),
        rows_ND.new_empty(1, dtype=torch.float32),
    )


def sigmoid_shape(
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_column: int = 0,
    row_ids_N: Tensor | None = None,
    column_ids_M: Tensor | None = None,
) -> Tensor:
    check("contrastive_sigmoid", rows_ND, columns_MD, scale, bias, row_ids_N, column_ids_M)
    return rows_ND.new_empty(rows_ND.shape[0], dtype=torch.float32)


def sigmoid_backward_shapes(rows_ND: Tensor, columns_MD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        *backward_shapes(rows_ND, columns_MD),
        rows_ND.new_empty(1, dtype=torch.float32),
    )

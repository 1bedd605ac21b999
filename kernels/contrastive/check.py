"""Argument checks of the contrastive ops, shared by their providers."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def check(
    op: str,
    rows_ND: Tensor,
    columns_MD: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids_N: Tensor | None,
    column_ids_M: Tensor | None,
) -> None:
    """Raises ValueError, saying what was given and what is allowed."""
    if rows_ND.dim() != 2 or columns_MD.dim() != 2 or rows_ND.shape[1] != columns_MD.shape[1]:
        raise ValueError(
            f"{op}: rows and columns must have the shapes (N, D) and (M, D), "
            f"got {tuple(rows_ND.shape)} and {tuple(columns_MD.shape)}"
        )
    allowed = (*DTYPES, torch.float64)  # float64: the definition that providers are held to
    if rows_ND.dtype not in allowed or rows_ND.dtype != columns_MD.dtype:
        raise ValueError(
            f"{op}: rows and columns must both be float32 or both bfloat16, "
            f"got {rows_ND.dtype} and {columns_MD.dtype}"
        )
    for what, value in (("scale", scale), ("bias", bias)):
        if value is not None and (
            value.shape != (1,) or value.dtype not in (torch.float32, torch.float64)
        ):
            raise ValueError(
                f"{op}: {what} must be one float32 value of shape (1,), "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    if (row_ids_N is None) != (column_ids_M is None):
        raise ValueError(f"{op}: give row_ids and column_ids, or neither")
    lengths = ("row_ids", row_ids_N, len(rows_ND)), ("column_ids", column_ids_M, len(columns_MD))
    for what, ids, length in lengths:
        if ids is not None and (ids.shape != (length,) or ids.dtype != torch.int64):
            raise ValueError(
                f"{op}: {what} must be int64 of shape ({length},), "
                f"got {ids.dtype} of shape {tuple(ids.shape)}"
            )
    _check_devices(op, rows_ND, columns_MD, scale, bias, row_ids_N, column_ids_M)


def check_vectors(op: str, like: Tensor, length: int, **vectors: Tensor | None) -> None:
    """Statistics and gradients: one float32 value a row (or a column), where they are given."""
    for what, values in vectors.items():
        if values is None:
            continue
        if values.shape != (length,) or values.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{op}: {what} must be float32 of shape ({length},), "
                f"got {values.dtype} of shape {tuple(values.shape)}"
            )
        _check_devices(op, like, values)


def check_both(op: str, row_sum_grad_N: Tensor | None, column_sum_grad_M: Tensor | None) -> None:
    """Sums are asked for on both sides or on none."""
    if (row_sum_grad_N is None) != (column_sum_grad_M is None):
        raise ValueError(f"{op}: give row_sum_grad and column_sum_grad, or neither")


def _check_devices(op: str, *given: Tensor | None) -> None:
    devices = {str(value.device) for value in given if value is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {sorted(devices)}")

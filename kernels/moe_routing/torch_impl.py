"""grouped_mm and gather_grouped_mm by torch._grouped_mm: CUTLASS's grouped product on Hopper.

It serves bfloat16 on compute capability 9.0 and 10.0 (aten/native/cuda/GroupedBlas.cpp) without
waiting for the device; elsewhere, and in float32, torch multiplies expert by expert and waits for
the offsets, so there Triton's is the faster. It asks for rows and matrices of whole 16 bytes:
others are padded here, which costs copies. It reads offsets as they are and leaves the rows after
the last segment unwritten: they are held within the rows first, and the tail is zeroed.
The gathering form permutes first: torch's product cannot gather.
Left out: 1,024 experts and more, which its kernel does not take.
Status: run on the CPU, where torch computes the same by a loop; not run on a GPU yet.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from carillon.kernels.moe_routing import check, check_values

MAX_EXPERTS = 1023
ALIGNED_BYTES = 16


def grouped_mm(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    op = "grouped_mm"
    _check(op, x_RD, weights_EDF, offsets)
    check_values.check_offsets(op, offsets, x_RD.shape[0])
    return _multiply(x_RD, weights_EDF, offsets)


def grouped_mm_backward(
    grad_RF: Tensor, x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    op = "grouped_mm_backward"
    _check(op, x_RD, weights_EDF, offsets)
    check.require_grad(op, grad_RF, x_RD, x_RD.shape[0], weights_EDF.shape[2])
    check_values.check_offsets(op, offsets, x_RD.shape[0])
    return (
        _multiply(grad_RF, weights_EDF.transpose(1, 2), offsets),
        _grad_weights(x_RD, grad_RF, weights_EDF, offsets),
    )


def gather_grouped_mm(
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> Tensor:
    op = "gather_grouped_mm"
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, row_to_slot_R, slot_to_row_TK)
    _check(op, x_TD, weights_EDF, offsets)
    check_values.check_offsets(op, offsets, len(row_to_slot_R))
    rows_RD = _permute(x_TD, row_to_slot_R, slot_to_row_TK)
    return _multiply(rows_RD, weights_EDF, offsets)


def gather_grouped_mm_backward(
    grad_RF: Tensor,
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    op = "gather_grouped_mm_backward"
    maps = (row_to_slot_R, slot_to_row_TK)
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, *maps)
    _check(op, x_TD, weights_EDF, offsets)
    check.require_grad(op, grad_RF, x_TD, len(row_to_slot_R), weights_EDF.shape[2])
    check_values.check_offsets(op, offsets, len(row_to_slot_R))
    grad_rows_RD = _multiply(grad_RF, weights_EDF.transpose(1, 2), offsets)
    return (
        _sum_rows(grad_rows_RD, *maps),
        _grad_weights(_permute(x_TD, *maps), grad_RF, weights_EDF, offsets),
    )


def _check(op: str, x: Tensor, weights_EDF: Tensor, offsets: Tensor) -> None:
    check.check_grouped_mm(op, x, weights_EDF, offsets)
    if weights_EDF.shape[0] > MAX_EXPERTS:
        raise ValueError(
            f"{op}: the torch provider takes at most {MAX_EXPERTS} experts, "
            f"got {weights_EDF.shape[0]}"
        )


def _multiply(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    num_rows, out_width = x_RD.shape[0], weights_EDF.shape[2]
    if 0 in (*x_RD.shape, out_width):
        return x_RD.new_zeros(num_rows, out_width)
    # Zeros that pad the depth add nothing, padded columns are cut off.
    matrices_EDF = _aligned_matrices(weights_EDF)
    out_RF = torch._grouped_mm(_aligned(x_RD), matrices_EDF, offs=_ends(offsets, num_rows))
    out_RF = out_RF[:, :out_width].contiguous()
    _zero_tail(out_RF, offsets)
    return out_RF


def _grad_weights(x_RD: Tensor, grad_RF: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    """The sum over each expert's rows of x^T grad; zero for an expert without rows."""
    _, width, out_width = weights_EDF.shape
    if 0 in (*x_RD.shape, out_width):
        return x_RD.new_zeros(weights_EDF.shape)
    ends_E = _ends(offsets, x_RD.shape[0])
    out_EDF = torch._grouped_mm(_aligned(x_RD).T, _aligned(grad_RF), offs=ends_E)
    return out_EDF[:, :width, :out_width].contiguous()


def _ends(offsets: Tensor, num_rows: int) -> Tensor:
    """Ends of the segments, rising and within the rows whatever was given."""
    return offsets.clamp(0, num_rows).cummax(0).values[1:].contiguous()


def _aligned(rows: Tensor) -> Tensor:
    """Dense rows of whole 16 bytes, at such an address: copied where they are not."""
    missing = -rows.shape[-1] % (ALIGNED_BYTES // rows.element_size())
    rows = pad(rows, (0, missing)) if missing else rows.contiguous()
    return rows if rows.data_ptr() % ALIGNED_BYTES == 0 else rows.clone()


def _aligned_matrices(weights_EDF: Tensor) -> Tensor:
    """Matrices whose rows, or columns where they are stored so, are whole 16 bytes.

    Both sizes are padded: the one is the depth, in which x's rows are padded too.
    """
    _, width, out_width = weights_EDF.shape
    whole = ALIGNED_BYTES // weights_EDF.element_size()
    if width % whole or out_width % whole:
        weights_EDF = pad(weights_EDF, (0, -out_width % whole, 0, -width % whole))
    if weights_EDF.transpose(1, 2).is_contiguous():
        return _aligned(weights_EDF.transpose(1, 2)).transpose(1, 2)
    return _aligned(weights_EDF)


def _zero_tail(out_RF: Tensor, offsets: Tensor) -> None:
    if out_RF.device.type == "cpu":
        out_RF[int(offsets[-1]) :] = 0
    else:
        from carillon.kernels.moe_routing import triton_grouped

        triton_grouped.zero_tail(out_RF, offsets.contiguous())


def _permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    if x_TD.device.type == "cpu":
        rows_RD: Tensor = torch.ops.carillon.moe_permute(x_TD, row_to_slot_R, slot_to_row_TK)
        return rows_RD
    from carillon.kernels.moe_routing import triton_rows

    return triton_rows.permute(x_TD, row_to_slot_R, slot_to_row_TK)


def _sum_rows(grad_RD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    if grad_RD.device.type == "cpu":
        sums_TD: Tensor = torch.ops.carillon.moe_permute_backward(
            grad_RD, row_to_slot_R, slot_to_row_TK
        )
        return sums_TD
    from carillon.kernels.moe_routing import triton_rows

    return triton_rows.sum_rows(grad_RD, None, slot_to_row_TK)


IMPLEMENTS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "grouped_mm": grouped_mm,
        "grouped_mm_backward": grouped_mm_backward,
        "gather_grouped_mm": gather_grouped_mm,
        "gather_grouped_mm_backward": gather_grouped_mm_backward,
    }
)

"""Checks of values: finite logits, indices in range, maps that belong together, rising offsets.

They read tensors on the CPU only: elsewhere reading would wait for the device. The kernels there
are safe without: an index out of range counts as dropped or as padding, offsets are held within
the rows, and nothing leads outside a buffer.
"""

import torch
from torch import Tensor


def check_finite(op: str, name: str, tensor: Tensor) -> None:
    if _readable(tensor) and not tensor.isfinite().all():
        raise ValueError(f"{op}: {name} must be finite")


def check_indices(op: str, indices_TK: Tensor, num_experts: int) -> None:
    if not _readable(indices_TK):
        return
    wrong = indices_TK[(indices_TK < 0) | (indices_TK >= num_experts)]
    if wrong.numel():
        raise ValueError(f"{op}: indices must be from 0 to {num_experts - 1}, got {int(wrong[0])}")


def check_inverse(op: str, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> None:
    """The rows that slots name must be rows, and the two maps each other's inverse."""
    if not _readable(row_to_slot_R):
        return
    row_S, num_rows = slot_to_row_TK.reshape(-1).long(), row_to_slot_R.numel()
    wrong = row_S[(row_S < -1) | (row_S >= num_rows)]
    if wrong.numel():
        raise ValueError(
            f"{op}: slot_to_row must be -1 or from 0 to {num_rows - 1}, got {int(wrong[0])}"
        )
    kept_S = (row_S >= 0).nonzero()[:, 0]
    back_S = row_to_slot_R.long()[row_S[kept_S]]
    num_filled = int((row_to_slot_R != -1).sum())
    if not torch.equal(back_S, kept_S) or num_filled != len(kept_S):
        raise ValueError(
            f"{op}: row_to_slot and slot_to_row must be each other's inverse, as moe_plan "
            "gives them"
        )


def check_offsets(op: str, offsets: Tensor, num_rows: int) -> None:
    if not _readable(offsets):
        return
    ends = offsets.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > num_rows:
        raise ValueError(
            f"{op}: offsets must start at 0, never fall, and end at no more than the "
            f"{num_rows} rows"
        )


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"

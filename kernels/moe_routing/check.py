"""Checks of shapes, types and devices, with the messages that the native checks repeat.

They read no values, so that shape functions call them too; check_values.py has the others.
"""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16)
SCORES = ("softmax", "sigmoid")
MAX_SLOTS = 2**31 - 1


def require_floats(op: str, name: str, tensor: Tensor, num_dims: int, shape: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16, got {tensor.dtype}")
    require_shape(op, name, tensor, num_dims, shape)


def require_int32(op: str, name: str, tensor: Tensor, num_dims: int, shape: str) -> None:
    if tensor.dtype != torch.int32:
        raise ValueError(f"{op}: {name} must be int32, got {tensor.dtype}")
    require_shape(op, name, tensor, num_dims, shape)


def require_shape(op: str, name: str, tensor: Tensor, num_dims: int, shape: str) -> None:
    if tensor.dim() != num_dims:
        raise ValueError(f"{op}: {name} must have the shape {shape}, got {tuple(tensor.shape)}")


def require_same_device(op: str, first: Tensor, name: str, other: Tensor) -> None:
    if first.device != other.device:
        raise ValueError(f"{op}: {name} must be on {first.device}, got {other.device}")


def check_topk(
    logits_TE: Tensor, k: int, score: str, scale: float, selection_bias_E: Tensor | None
) -> None:
    op = "moe_topk"
    require_floats(op, "logits", logits_TE, 2, "(T, E)")
    num_experts = logits_TE.shape[1]
    if num_experts < 1:
        raise ValueError(f"{op}: there must be at least one expert, got {num_experts}")
    if not 1 <= k <= num_experts:
        raise ValueError(f"{op}: k must be from 1 to the number of experts {num_experts}, got {k}")
    _check_score(score, scale)
    if selection_bias_E is not None:
        if score != "sigmoid":
            raise ValueError(f"{op}: selection_bias needs sigmoid scores, got {score}")
        if selection_bias_E.dtype != torch.float32:
            raise ValueError(f"{op}: selection_bias must be float32, got {selection_bias_E.dtype}")
        if selection_bias_E.shape != (num_experts,):
            raise ValueError(
                f"{op}: selection_bias must have the shape ({num_experts},), "
                f"got {tuple(selection_bias_E.shape)}"
            )
        require_same_device(op, logits_TE, "selection_bias", selection_bias_E)


def check_topk_backward(
    grad_weights_TK: Tensor,
    grad_mean_scores_E: Tensor,
    grad_z_loss: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    score: str,
    scale: float,
) -> None:
    op = "moe_topk_backward"
    require_floats(op, "logits", logits_TE, 2, "(T, E)")
    num_tokens, num_experts = logits_TE.shape
    if num_experts < 1:
        raise ValueError(f"{op}: there must be at least one expert, got {num_experts}")
    require_int32(op, "indices", indices_TK, 2, "(T, k)")
    _check_score(score, scale)
    if indices_TK.shape[0] != num_tokens:
        raise ValueError(
            f"{op}: indices must have {num_tokens} rows as logits has, got {indices_TK.shape[0]}"
        )
    got = tuple(tuple(g.shape) for g in (grad_weights_TK, grad_mean_scores_E, grad_z_loss))
    wanted = (tuple(indices_TK.shape), (num_experts,), ())
    if got != wanted:
        raise ValueError(
            f"{op}: gradients must have the shapes {wanted[0]}, {wanted[1]} and {wanted[2]}, "
            f"got {got[0]}, {got[1]} and {got[2]}"
        )
    require_same_device(op, logits_TE, "indices", indices_TK)
    require_same_device(op, logits_TE, "grad_weights", grad_weights_TK)
    require_same_device(op, logits_TE, "grad_mean_scores", grad_mean_scores_E)
    require_same_device(op, logits_TE, "grad_z_loss", grad_z_loss)


def check_plan(indices_TK: Tensor, num_experts: int, alignment: int, capacity: int | None) -> None:
    op = "moe_plan"
    require_int32(op, "indices", indices_TK, 2, "(T, k)")
    if indices_TK.shape[1] < 1:
        raise ValueError(f"{op}: indices must have k of at least 1, got 0")
    if num_experts < 1:
        raise ValueError(f"{op}: there must be at least one expert, got {num_experts}")
    if alignment < 1:
        raise ValueError(f"{op}: alignment must be at least 1, got {alignment}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"{op}: capacity must be at least 1, got {capacity}")
    most = indices_TK.numel() + num_experts * (alignment - 1)
    if max(alignment, num_experts, most) > MAX_SLOTS:
        raise ValueError(f"{op}: there must be at most {MAX_SLOTS} rows, padding included")


def check_maps(op: str, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> None:
    require_int32(op, "row_to_slot", row_to_slot_R, 1, "(R,)")
    require_int32(op, "slot_to_row", slot_to_row_TK, 2, "(T, k)")
    require_same_device(op, slot_to_row_TK, "row_to_slot", row_to_slot_R)
    if slot_to_row_TK.shape[1] < 1:
        raise ValueError(f"{op}: slot_to_row must have k of at least 1, got 0")


def check_permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> None:
    op = "moe_permute"
    require_floats(op, "x", x_TD, 2, "(T, D)")
    require_same_device(op, x_TD, "slot_to_row", slot_to_row_TK)
    check_maps(op, row_to_slot_R, slot_to_row_TK)
    _require_tokens(op, "x", x_TD, slot_to_row_TK)


def check_permute_backward(grad_RD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> None:
    op = "moe_permute_backward"
    require_floats(op, "grad", grad_RD, 2, "(R, D)")
    require_same_device(op, grad_RD, "slot_to_row", slot_to_row_TK)
    check_maps(op, row_to_slot_R, slot_to_row_TK)
    _require_rows(op, grad_RD, row_to_slot_R)


def check_unpermute(
    op: str, rows_RD: Tensor, weights_TK: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor
) -> None:
    require_floats(op, "rows", rows_RD, 2, "(R, D)")
    if weights_TK.dtype != torch.float32:
        raise ValueError(f"{op}: weights must be float32, got {weights_TK.dtype}")
    require_same_device(op, rows_RD, "weights", weights_TK)
    require_same_device(op, rows_RD, "slot_to_row", slot_to_row_TK)
    check_maps(op, row_to_slot_R, slot_to_row_TK)
    if weights_TK.shape != slot_to_row_TK.shape:
        raise ValueError(
            f"{op}: weights must have the shape of slot_to_row {tuple(slot_to_row_TK.shape)}, "
            f"got {tuple(weights_TK.shape)}"
        )
    _require_rows(op, rows_RD, row_to_slot_R)


def check_grouped_mm(op: str, x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> None:
    require_floats(op, "x", x_RD, 2, "(R, D)")
    require_shape(op, "weights", weights_EDF, 3, "(E, D, F)")
    if weights_EDF.dtype != x_RD.dtype:
        raise ValueError(f"{op}: weights must be {x_RD.dtype} as x is, got {weights_EDF.dtype}")
    require_same_device(op, x_RD, "weights", weights_EDF)
    require_same_device(op, x_RD, "offsets", offsets)
    num_experts, width = weights_EDF.shape[:2]
    if num_experts < 1:
        raise ValueError(f"{op}: there must be at least one expert, got {num_experts}")
    if width != x_RD.shape[1]:
        raise ValueError(f"{op}: weights must have D = {x_RD.shape[1]} as x has, got {width}")
    require_int32(op, "offsets", offsets, 1, "(E + 1,)")
    if offsets.shape[0] != num_experts + 1:
        raise ValueError(
            f"{op}: offsets must have E + 1 = {num_experts + 1} values, got {offsets.shape[0]}"
        )


def check_gather_grouped_mm(
    op: str,
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> None:
    check_grouped_mm(op, x_TD, weights_EDF, offsets)
    require_same_device(op, x_TD, "slot_to_row", slot_to_row_TK)
    check_maps(op, row_to_slot_R, slot_to_row_TK)
    _require_tokens(op, "x", x_TD, slot_to_row_TK)


def _require_tokens(op: str, name: str, x_TD: Tensor, slot_to_row_TK: Tensor) -> None:
    if x_TD.shape[0] != slot_to_row_TK.shape[0]:
        raise ValueError(
            f"{op}: {name} must have {slot_to_row_TK.shape[0]} rows, one a token of slot_to_row, "
            f"got {x_TD.shape[0]}"
        )


def require_grad(op: str, grad: Tensor, x: Tensor, num_rows: int, width: int) -> None:
    """A gradient has the type and the device of what it is a gradient of."""
    if grad.dtype != x.dtype or tuple(grad.shape) != (num_rows, width):
        raise ValueError(
            f"{op}: grad must be {x.dtype} of the shape ({num_rows}, {width}), "
            f"got {grad.dtype} {tuple(grad.shape)}"
        )
    require_same_device(op, x, "grad", grad)


def _require_rows(op: str, rows_RD: Tensor, row_to_slot_R: Tensor) -> None:
    if rows_RD.shape[0] != row_to_slot_R.shape[0]:
        raise ValueError(
            f"{op}: rows must be {row_to_slot_R.shape[0]}, as row_to_slot has, "
            f"got {rows_RD.shape[0]}"
        )


def _check_score(score: str, scale: float) -> None:
    if score not in SCORES:
        raise ValueError(f"moe_topk: score must be softmax or sigmoid, got {score}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"moe_topk: scale must be finite and positive, got {scale}")

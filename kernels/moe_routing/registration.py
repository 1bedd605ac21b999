"""Shapes and gradients of the moe ops, for torch.ops.carillon, carillon_triton, carillon_torch.

A backward is an op of its own, so that torch.compile sees one call and each provider computes it.
A namespace may have some of the ops only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carillon.kernels.moe_routing import check
from carillon.kernels.moe_routing.reference import num_rows
from carillon.kernels.second_derivative import refuse_second_derivative

Context = Any


def register(namespace: str) -> None:
    """Registers shape functions and gradients; called once a namespace, after the schemas."""
    ops = getattr(torch.ops, namespace)

    def topk_backward(
        ctx: Context, weights: Tensor, _i: Any, _n: Any, means: Tensor, z: Tensor
    ) -> Any:
        logits_TE, indices_TK = ctx.saved_tensors
        grad_TE = ops.moe_topk_backward(weights, means, z, logits_TE, indices_TK, *ctx.settings)
        return grad_TE, None, None, None, None, None

    def permute_backward(ctx: Context, grad_RD: Tensor) -> Any:
        return ops.moe_permute_backward(grad_RD, *ctx.saved_tensors), None, None

    def unpermute_backward(ctx: Context, grad_TD: Tensor) -> Any:
        return *ops.moe_unpermute_backward(grad_TD, *ctx.saved_tensors), None, None

    def mm_backward(ctx: Context, grad_RF: Tensor) -> Any:
        return *ops.grouped_mm_backward(grad_RF, *ctx.saved_tensors), None

    def gather_backward(ctx: Context, grad_RF: Tensor) -> Any:
        return *ops.gather_grouped_mm_backward(grad_RF, *ctx.saved_tensors), None, None, None

    for name, shape in _SHAPES.items():
        if not hasattr(ops, name):
            continue
        torch.library.register_fake(f"{namespace}::{name}", shape)
    for name, backward, save in (
        ("moe_topk", topk_backward, _save_topk),
        ("moe_permute", permute_backward, _save_maps),
        ("moe_unpermute", unpermute_backward, _save_all),
        ("grouped_mm", mm_backward, _save_all),
        ("gather_grouped_mm", gather_backward, _save_all),
    ):
        if hasattr(ops, name):
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=save)
    refuse_second_derivative(
        namespace,
        *("moe_topk_backward", "moe_permute_backward", "moe_unpermute_backward"),
        *("grouped_mm_backward", "gather_grouped_mm_backward"),
    )


def _save_topk(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, score, renormalize, scale, _ = inputs
    ctx.save_for_backward(logits_TE, output[1])
    ctx.settings = (score, renormalize, scale)


def _save_maps(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _save_all(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _topk(
    logits_TE: Tensor,
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    selection_bias_E: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check.check_topk(logits_TE, k, score, scale, selection_bias_E)
    num_tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty((num_tokens, k), dtype=torch.float32),
        logits_TE.new_empty((num_tokens, k), dtype=torch.int32),
        logits_TE.new_empty((num_experts,), dtype=torch.int32),
        logits_TE.new_empty((num_experts,), dtype=torch.float32),
        logits_TE.new_empty((), dtype=torch.float32),
    )


def _topk_backward(
    grad_weights_TK: Tensor,
    grad_mean_scores_E: Tensor,
    grad_z_loss: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _plan(
    indices_TK: Tensor, num_experts: int, alignment: int = 16, capacity: int | None = None
) -> tuple[Tensor, ...]:
    check.check_plan(indices_TK, num_experts, alignment, capacity)
    size = num_rows(indices_TK.shape[0] * indices_TK.shape[1], num_experts, alignment, capacity)
    return (
        indices_TK.new_empty((num_experts + 1,)),
        indices_TK.new_empty((size,)),
        indices_TK.new_empty(indices_TK.shape),
    )


def _permute(x_TD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    check.check_permute(x_TD, row_to_slot_R, slot_to_row_TK)
    return x_TD.new_empty((row_to_slot_R.shape[0], x_TD.shape[1]))


def _permute_backward(grad_RD: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    return grad_RD.new_empty((slot_to_row_TK.shape[0], grad_RD.shape[1]))


def _unpermute(
    rows_RD: Tensor, weights_TK: Tensor, row_to_slot_R: Tensor, slot_to_row_TK: Tensor
) -> Tensor:
    check.check_unpermute("moe_unpermute", rows_RD, weights_TK, row_to_slot_R, slot_to_row_TK)
    return rows_RD.new_empty((slot_to_row_TK.shape[0], rows_RD.shape[1]))


def _unpermute_backward(
    grad_TD: Tensor,
    rows_RD: Tensor,
    weights_TK: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    return rows_RD.new_empty(rows_RD.shape), weights_TK.new_empty(weights_TK.shape)


def _grouped_mm(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    check.check_grouped_mm("grouped_mm", x_RD, weights_EDF, offsets)
    return x_RD.new_empty((x_RD.shape[0], weights_EDF.shape[2]))


def _grouped_mm_backward(
    grad_RF: Tensor, x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), weights_EDF.new_empty(weights_EDF.shape)


def _gather_grouped_mm(
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> Tensor:
    op = "gather_grouped_mm"
    check.check_gather_grouped_mm(op, x_TD, weights_EDF, offsets, row_to_slot_R, slot_to_row_TK)
    return x_TD.new_empty((row_to_slot_R.shape[0], weights_EDF.shape[2]))


def _gather_grouped_mm_backward(
    grad_RF: Tensor,
    x_TD: Tensor,
    weights_EDF: Tensor,
    offsets: Tensor,
    row_to_slot_R: Tensor,
    slot_to_row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weights_EDF.new_empty(weights_EDF.shape)


_SHAPES: dict[str, Callable[..., Any]] = {
    "moe_topk": _topk,
    "moe_topk_backward": _topk_backward,
    "moe_plan": _plan,
    "moe_permute": _permute,
    "moe_permute_backward": _permute_backward,
    "moe_unpermute": _unpermute,
    "moe_unpermute_backward": _unpermute_backward,
    "grouped_mm": _grouped_mm,
    "grouped_mm_backward": _grouped_mm_backward,
    "gather_grouped_mm": _gather_grouped_mm,
    "gather_grouped_mm_backward": _gather_grouped_mm_backward,
}

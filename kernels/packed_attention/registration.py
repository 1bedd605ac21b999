"""Shapes and the autograd formula of packed_attention, for torch.ops.carillon and carillon_triton.

The formula calls packed_attention_backward of the same namespace. It can be taken once: the
backward op has no derivative, and says so.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carillon.kernels.packed_attention.check import check, check_backward
from carillon.kernels.second_derivative import refuse_second_derivative

_NUM_INPUTS = 10


def register(namespace: str) -> None:
    """Registers shape functions and formulas; called once a namespace, after the declarations."""
    forward, backward = f"{namespace}::packed_attention", f"{namespace}::packed_attention_backward"
    torch.library.register_fake(forward, shape)
    torch.library.register_fake(backward, backward_shape)
    operators = getattr(torch.ops, namespace)
    differentiate = functools.partial(_differentiate, operators.packed_attention_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_keep)
    refuse_second_derivative(namespace, "packed_attention_backward")


def shape(
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    check(
        q_QHD, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, prefix_lengths, scale,
    )  # fmt: skip
    total, num_heads, _ = q_QHD.shape
    lse_HQ = q_QHD.new_empty((num_heads, total), dtype=torch.float32)
    return q_QHD.new_empty(q_QHD.shape), lse_HQ


def backward_shape(
    grad_out_QHD: Tensor,
    grad_lse_HQ: Tensor | None,
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    *lengths_and_mask: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    defaults = (False, None, None)[len(lengths_and_mask) - 4 :]
    check(q_QHD, k_KGD, v_KGD, *lengths_and_mask, *defaults)
    check_backward(grad_out_QHD, grad_lse_HQ, q_QHD, out_QHD, lse_HQ)
    return (
        q_QHD.new_empty(q_QHD.shape),
        k_KGD.new_empty(k_KGD.shape),
        v_KGD.new_empty(v_KGD.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, causal, prefix, scale = inputs
    ctx.set_materialize_grads(False)  # an lse that nobody used costs no tensor of zeros
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, prefix)
    ctx.plain = (max_q, max_k, causal, scale)


def _differentiate(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k, prefix = ctx.saved_tensors
    max_q, max_k, causal, scale = ctx.plain
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, prefix, scale
    )
    return (*grads, *[None] * (_NUM_INPUTS - len(grads)))

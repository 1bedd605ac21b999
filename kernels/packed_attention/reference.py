"""Definition of packed_attention: attention over sequences that lie one after another, no padding.

Sequence s owns the rows cu_seqlens[s] to cu_seqlens[s + 1]; a query sees keys of its own sequence
only (the block-diagonal mask), and of those the first `visible_keys(...)`. Every mask here is such
a prefix of the keys, which is what the providers compute with.
Legend: Q total_q, K total_k, H num_heads, G num_kv_heads, D head_dim; l and m one sequence's.
"""

import math

import torch
from torch import Tensor

from carillon.kernels.packed_attention.check import check, check_backward, check_values
from carillon.kernels.roofline import Cost


def packed_attention(
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
    """softmax(scale * q k^T) v and its log-sum-exp, for each sequence and head.

    Shapes: q (total_q, num_heads, head_dim), k and v (total_k, num_kv_heads, head_dim), any
    strides; cu_seqlens (num_sequences + 1,), prefix_lengths (num_sequences,), int32 or int64
    -> out as q, contiguous; lse (num_heads, total_q) float32. Query head h reads key head
    h // (num_heads / num_kv_heads). head_dim: a multiple of 8 from 8 to 256.
    q, k and v are float32 or bfloat16, sums are float32. `scale` is 1 / sqrt(head_dim) by default.

    `causal` is aligned at the bottom right, as in flash-attention: of l queries and m keys, query i
    sees key j where j <= i + m - l. With `prefix_lengths` it also sees the first p keys.
    A query that sees no key, in an empty sequence or before the first key, has out 0 and lse -inf,
    and gradients of 0. Both results are differentiable (once), with respect to q, k and v.
    max_seqlen is an upper bound of the lengths: launches on a GPU are sized by it without reading
    the lengths back. The CPU providers are deterministic, whatever the number of threads.

    Raises:
        ValueError: another dtype, shape or device; num_heads no multiple of num_kv_heads;
            cu_seqlens that do not run from 0 to the number of rows without decreasing; a length
            above max_seqlen; a prefix length below 0, above the number of keys, or without
            `causal`; a scale that is not finite. On CUDA the Triton provider does not read the
            lengths back: a sequence whose lengths do not add up gets NaN there, and no memory
            outside the tensors is touched.

    Source: Vaswani et al. 2017, equation 1; the masks and lse as in Dao 2023 (FlashAttention-2).
    """
    check(
        q_QHD, k_KGD, v_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, prefix_lengths, scale,
    )  # fmt: skip
    starts_q, starts_k, prefixes = check_values(
        q_QHD, k_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix_lengths
    )
    factor = default_scale(q_QHD.shape[2]) if scale is None else scale
    group = q_QHD.shape[1] // k_KGD.shape[1]
    q_HQD = q_QHD.float().transpose(0, 1)
    k_HKD = k_KGD.float().transpose(0, 1).repeat_interleave(group, dim=0)
    v_HKD = v_KGD.float().transpose(0, 1).repeat_interleave(group, dim=0)
    outs = [q_HQD[:, :0] + 0 * (k_HKD.sum() + v_HKD.sum())]  # a graph to all, however few tokens
    lses = [outs[0].sum(2)]
    for s in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
        prefix = 0 if prefixes is None else prefixes[s]
        visible_lm = _mask(rows, keys, prefix, q_QHD.device) if causal else None
        out, lse = _attend(q_HQD[:, rows] * factor, k_HKD[:, keys], v_HKD[:, keys], visible_lm)
        outs.append(out)
        lses.append(lse)
    out_QHD = torch.cat(outs, dim=1).transpose(0, 1)
    return out_QHD.to(q_QHD.dtype).contiguous(), torch.cat(lses, dim=1)


def _attend(
    q_HlD: Tensor, k_HmD: Tensor, v_HmD: Tensor, visible_lm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence, with a softmax whose gradient is 0 where no key is visible."""
    scores_Hlm = q_HlD @ k_HmD.transpose(1, 2)
    if visible_lm is not None:
        scores_Hlm = scores_Hlm.masked_fill(~visible_lm, -torch.inf)
    if scores_Hlm.shape[2] == 0:
        return q_HlD * 0, q_HlD.sum(2) * 0 - torch.inf
    top_Hl = scores_Hlm.detach().amax(2)
    top_Hl = torch.where(top_Hl == -torch.inf, 0.0, top_Hl)
    weights_Hlm = torch.exp(scores_Hlm - top_Hl[..., None])
    sum_Hl = weights_Hlm.sum(2)
    seen_Hl = sum_Hl != 0
    divisor_Hl = torch.where(seen_Hl, sum_Hl, 1.0)
    lse_Hl = torch.where(seen_Hl, divisor_Hl.log() + top_Hl, -torch.inf)
    return weights_Hlm @ v_HmD / divisor_Hl[..., None], lse_Hl


def packed_attention_backward(
    grad_out_QHD: Tensor,
    grad_lse_HQ: Tensor | None,
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed_attention with respect to q, k and v, in their shapes and dtype.

    `grad_lse` None is a gradient of zeros. Weights are taken anew, P = exp(scale * q k^T - lse),
    and dS = P * (dO v^T - rowsum(dO * out) + grad_lse), dq = scale * dS k, dk = scale * dS^T q,
    dv = P^T dO. Sums are float32. Keys may come in parts: with out and lse of all keys, merged, a
    call over some of them gives their dk and dv, and their terms of dq.

    Raises:
        ValueError: as packed_attention; a gradient or result of another shape, dtype or device.

    Source: Dao 2023 (FlashAttention-2), algorithm 2; the term of grad_lse is its own derivative.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check(q_QHD, k_KGD, v_KGD, *lengths, causal, prefix_lengths, scale)
    check_backward(grad_out_QHD, grad_lse_HQ, q_QHD, out_QHD, lse_HQ)
    starts_q, starts_k, prefixes = check_values(
        q_QHD, k_KGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix_lengths
    )
    factor = default_scale(q_QHD.shape[2]) if scale is None else scale
    q, grad_out, out = (_grouped(x, k_KGD.shape[1]) for x in (q_QHD, grad_out_QHD, out_QHD))
    k, v = (_grouped(x, k_KGD.shape[1]) for x in (k_KGD, v_KGD))
    lse, delta = torch.unflatten(lse_HQ, 0, q.shape[:2]), (grad_out * out).sum(3)
    if grad_lse_HQ is not None:
        delta = delta - torch.unflatten(grad_lse_HQ, 0, q.shape[:2])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for s in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
        exponents = factor * (q[:, :, rows] @ k[:, :, keys].mT) - lse[:, :, rows, None]
        if causal:  # before the exponential: rows that see no key have an lse of -inf
            prefix = 0 if prefixes is None else prefixes[s]
            exponents = exponents.masked_fill(~_mask(rows, keys, prefix, q.device), -torch.inf)
        weights = exponents.exp()
        products = weights * (grad_out[:, :, rows] @ v[:, :, keys].mT - delta[:, :, rows, None])
        dq[:, :, rows] = factor * (products @ k[:, :, keys])
        dk[:, :, keys] = factor * (products.mT @ q[:, :, rows]).sum(1, keepdim=True)
        dv[:, :, keys] = (weights.mT @ grad_out[:, :, rows]).sum(1, keepdim=True)
    return (
        dq.flatten(0, 1).transpose(0, 1).to(q_QHD.dtype).contiguous(),
        dk.squeeze(1).transpose(0, 1).to(k_KGD.dtype).contiguous(),
        dv.squeeze(1).transpose(0, 1).to(v_KGD.dtype).contiguous(),
    )


def _grouped(x_NHD: Tensor, groups: int) -> Tensor:
    """By the key head that is read, in float32: (groups, heads of a group, tokens, head_dim)."""
    return torch.unflatten(x_NHD.float().transpose(0, 1), 0, (groups, -1))


def _mask(rows: slice, keys: slice, prefix: int, device: torch.device) -> Tensor:
    """True where a query of a causal sequence sees a key: (l, m)."""
    num_keys = keys.stop - keys.start
    index_m = torch.arange(num_keys, device=device)
    return index_m < visible_keys(rows.stop - rows.start, num_keys, prefix, device)[:, None]


def visible_keys(num_queries: int, num_keys: int, prefix: int, device: torch.device) -> Tensor:
    """How many keys, counted from the first, each query of a causal sequence sees."""
    index = torch.arange(num_queries, device=device)
    return (index + (num_keys - num_queries + 1)).clamp(min=prefix, max=num_keys)


def default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim)


def cost(
    lengths_q: list[int],
    lengths_k: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> Cost:
    """Without a causal mask: two products of a forward pass, five of a backward pass; each input
    read and each result written once (lse and the gradients among them)."""
    pairs = sum(l * m for l, m in zip(lengths_q, lengths_k, strict=True))  # noqa: E741
    rows_q, rows_k = sum(lengths_q) * num_heads, sum(lengths_k) * num_kv_heads
    num_tensors_q, num_tensors_k = (4, 4) if backward else (2, 2)
    num_values = (num_tensors_q * rows_q + num_tensors_k * rows_k) * head_dim
    products = 5 if backward else 2
    return Cost(
        flops=2.0 * products * pairs * num_heads * head_dim,
        size_bytes=float(num_values * dtype.itemsize + 4 * rows_q),
    )

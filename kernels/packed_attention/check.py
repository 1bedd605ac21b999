"""Argument checks of packed_attention: those of shapes, and those of the lengths' values.

csrc/packed_attention/check.h says the same in the same words.
"""

import itertools
import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


def check(
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    prefix_lengths: Tensor | None,
    scale: float | None,
) -> None:
    """Raises ValueError for what can be seen without reading a tensor's values."""
    _check_heads(q_QHD, k_KGD, v_KGD)
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts.dtype not in INDEX_DTYPES or starts.dim() != 1 or starts.shape[0] < 1:
            raise _error(
                f"{name} must be int32 or int64 of the shape (num_sequences + 1,), "
                f"got {starts.dtype} {list(starts.shape)}"
            )
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise _error(
            "cu_seqlens_q and cu_seqlens_k must be equally long, "
            f"got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    tensors = {"k": k_KGD, "v": v_KGD, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if prefix_lengths is not None:
        tensors["prefix_lengths"] = prefix_lengths
        if not causal:
            raise _error("prefix_lengths widens the causal mask: pass causal=True, got False")
        if prefix_lengths.dtype not in INDEX_DTYPES or (
            prefix_lengths.dim() != 1 or prefix_lengths.shape[0] != cu_seqlens_q.shape[0] - 1
        ):
            raise _error(
                "prefix_lengths must be int32 or int64 of the shape (num_sequences,), one shorter "
                f"than cu_seqlens_q, got {prefix_lengths.dtype} {list(prefix_lengths.shape)}"
            )
    for name, tensor in tensors.items():
        if tensor.device != q_QHD.device:
            raise _error(f"{name} must be on q's device {q_QHD.device}, got {tensor.device}")
    if scale is not None and not math.isfinite(scale):
        raise _error(f"scale must be finite, got {scale}")


def _check_heads(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor) -> None:
    if q_QHD.dtype not in DTYPES:
        raise _error(f"q must be float32 or bfloat16, got {q_QHD.dtype}")
    if k_KGD.dtype != q_QHD.dtype or v_KGD.dtype != q_QHD.dtype:
        raise _error(f"k and v must have q's dtype, got {k_KGD.dtype} and {v_KGD.dtype}")
    if q_QHD.dim() != 3:
        raise _error(
            f"q must have the shape (total_q, num_heads, head_dim), got {list(q_QHD.shape)}"
        )
    if k_KGD.dim() != 3 or v_KGD.dim() != 3 or k_KGD.shape != v_KGD.shape:
        raise _error(
            "k and v must have one shape (total_k, num_kv_heads, head_dim), "
            f"got {list(k_KGD.shape)} and {list(v_KGD.shape)}"
        )
    _, num_heads, head_dim = q_QHD.shape
    _, num_kv_heads, head_dim_k = k_KGD.shape
    if head_dim != head_dim_k or head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise _error(
            f"head_dim must be a multiple of {HEAD_DIM_STEP} from {HEAD_DIM_STEP} to "
            f"{MAX_HEAD_DIM}, the same for q and k, got {head_dim} and {head_dim_k}"
        )
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise _error(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )


def check_values(
    q_QHD: Tensor,
    k_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_lengths: Tensor | None,
) -> tuple[list[int], list[int], list[int] | None]:
    """Raises ValueError for lengths that do not add up; returns the values, read once."""
    starts_q = _check_starts("q", cu_seqlens_q, q_QHD.shape[0], max_seqlen_q)
    starts_k = _check_starts("k", cu_seqlens_k, k_KGD.shape[0], max_seqlen_k)
    if prefix_lengths is None:
        return starts_q, starts_k, None
    prefixes: list[int] = prefix_lengths.tolist()
    for i, prefix in enumerate(prefixes):
        length = starts_k[i + 1] - starts_k[i]
        if not 0 <= prefix <= length:
            raise _error(
                f"prefix_lengths must be from 0 to the number of keys, got {prefix} for sequence "
                f"{i} with {length} keys"
            )
    return starts_q, starts_k, prefixes


def _check_starts(of: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[int]:
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise _error(
            f"cu_seqlens_{of} must begin with 0 and end with total_{of} = {total}, "
            f"got {starts[0]} and {starts[-1]}"
        )
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end < begin:
            raise _error(f"cu_seqlens_{of} must not decrease, got {begin} then {end} at {i}")
        if end - begin > max_seqlen:
            raise _error(
                f"max_seqlen_{of} must be at least the longest length, got {max_seqlen} where "
                f"sequence {i} has {end - begin}"
            )
    return starts


def check_backward(
    grad_out_QHD: Tensor,
    grad_lse_HQ: Tensor | None,
    q_QHD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
) -> None:
    """Raises ValueError for gradients or results that do not belong to q."""
    for name, tensor in (("grad_out", grad_out_QHD), ("out", out_QHD)):
        if tensor.shape != q_QHD.shape or tensor.dtype != q_QHD.dtype:
            raise _error(
                f"{name} must have q's shape {list(q_QHD.shape)} and dtype {q_QHD.dtype}, "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
    shape = (q_QHD.shape[1], q_QHD.shape[0])
    for name, rows in (("grad_lse", grad_lse_HQ), ("lse", lse_HQ)):
        if rows is not None and (rows.shape != shape or rows.dtype != torch.float32):
            raise _error(
                f"{name} must be float32 of the shape (num_heads, total_q) = {list(shape)}, "
                f"got {rows.dtype} {list(rows.shape)}"
            )
    for name, given in (("grad_out", grad_out_QHD), ("grad_lse", grad_lse_HQ), ("out", out_QHD)):
        if given is not None and given.device != q_QHD.device:
            raise _error(f"{name} must be on q's device {q_QHD.device}, got {given.device}")
    if lse_HQ.device != q_QHD.device:
        raise _error(f"lse must be on q's device {q_QHD.device}, got {lse_HQ.device}")


def _error(what: str) -> ValueError:
    return ValueError(f"packed_attention: {what}")

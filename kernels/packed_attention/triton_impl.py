"""packed_attention in Triton: FlashAttention-2 with the lengths read on the device.

A program takes a block of one sequence's queries (forward, and dq) or keys (dk and dv) and leaves
at once where the sequence is shorter: grids are sized by max_seqlen, so nothing waits for the
lengths. Each result is written by one program, in one order: deterministic. float32 products are
three TF32 products (tf32x3), near float32's own accuracy, on tensor cores.
On CUDA the lengths are not read back: programs keep inside the tensors whatever cu_seqlens hold,
and what belongs to no sequence, or to one whose lengths do not add up, is NaN.
Status: compiled for sm_90 and run in Triton's interpreter; not run on a GPU yet.
"""

from collections.abc import Iterable, Iterator

import torch
import triton
from torch import Tensor

from carillon.kernels.compile_report import CompileCase
from carillon.kernels.packed_attention.check import check, check_backward, check_values
from carillon.kernels.packed_attention.reference import default_scale
from carillon.kernels.packed_attention.triton_kernels import (
    LOG2_E,
    backward_keys,
    backward_queries,
    forward,
)
from carillon.kernels.packed_attention.triton_tiles import Tile, tile_of

_STRIDE_UNIT = 8  # elements: strides and pointers are multiples of 16 bytes of bfloat16


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
    """The op (reference.py) by Triton."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check(q_QHD, k_KGD, v_KGD, *lengths, causal, prefix_lengths, scale)
    total_q, num_heads, head_dim = q_QHD.shape
    q, k, v = (_aligned(x) for x in (q_QHD, k_KGD, v_KGD))
    out = _results(q.shape, q)
    lse = _results((num_heads, total_q), q, torch.float32)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0 or max_seqlen_q < 1:
        return out, lse
    tile = tile_of("forward", head_dim, q.dtype, max_seqlen_q)
    blocks = triton.cdiv(max_seqlen_q, tile.block_q)
    forward[(blocks * num_sequences, num_heads)](
        q, k, v, out, lse,
        *_shared_arguments(q, k, v, lengths, prefix_lengths, scale),
        **_constants(tile, q, causal, prefix_lengths),
    )  # fmt: skip
    return out, lse


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
    """The op (reference.py) by Triton: dq with rowsum(dO * out) on the way, then dk and dv."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check(q_QHD, k_KGD, v_KGD, *lengths, causal, prefix_lengths, scale)
    check_backward(grad_out_QHD, grad_lse_HQ, q_QHD, out_QHD, lse_HQ)
    _, num_heads, head_dim = q_QHD.shape
    q, k, v = (_aligned(x) for x in (q_QHD, k_KGD, v_KGD))
    grad_out, out, lse = (x.contiguous() for x in (grad_out_QHD, out_QHD, lse_HQ))
    grad_lse = lse if grad_lse_HQ is None else grad_lse_HQ.contiguous()
    delta = _results(lse.shape, lse)
    dq, dk, dv = (_results(x.shape, x) for x in (q, k, v))
    num_sequences = cu_seqlens_q.shape[0] - 1
    if num_sequences == 0:
        return dq, dk, dv
    shared = _shared_arguments(q, k, v, lengths, prefix_lengths, scale)
    if dq.numel() and max_seqlen_q > 0:
        tile = tile_of("backward_queries", head_dim, q.dtype, max_seqlen_q)
        blocks = triton.cdiv(max_seqlen_q, tile.block_q)
        backward_queries[(blocks * num_sequences, num_heads)](
            q, k, v, out, lse, grad_out, grad_lse, delta, dq, *shared,
            HAS_GRAD_LSE=grad_lse_HQ is not None, **_constants(tile, q, causal, prefix_lengths),
        )  # fmt: skip
    if dk.numel() and max_seqlen_k > 0:
        tile = tile_of("backward_keys", head_dim, q.dtype, max_seqlen_k, causal)
        blocks = triton.cdiv(max_seqlen_k, tile.block_k)
        backward_keys[(blocks * num_sequences, k.shape[1])](
            q, k, v, lse, grad_out, delta, dk, dv, *shared,
            **_constants(tile, q, causal, prefix_lengths),
        )  # fmt: skip
    return dq, dk, dv


IMPLEMENTS = {
    "packed_attention": packed_attention,
    "packed_attention_backward": packed_attention_backward,
}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    prefix_lengths: Tensor | None,
    scale: float | None,
) -> None:
    """The values too where reading them costs no wait for the GPU."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check(q, k, v, *lengths, causal, prefix_lengths, scale)
    if q.device.type == "cpu":
        check_values(q, k, *lengths, prefix_lengths)


def _results(shape: Iterable[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where lengths are not read, a program that finds no place for a row leaves NaN there."""
    return like.new_full(tuple(shape), float("nan"), dtype=dtype or like.dtype)


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows are dense and 16-byte aligned, as slices of one projection are."""
    strides = x.stride()
    if strides[2] == 1 and not (
        strides[0] % _STRIDE_UNIT or strides[1] % _STRIDE_UNIT or x.data_ptr() % 16
    ):
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _shared_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    prefix_lengths: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | int | float, ...]:
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    factor = default_scale(q.shape[2]) if scale is None else scale
    return (
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        cu_seqlens_q if prefix_lengths is None else prefix_lengths.contiguous(),
        cu_seqlens_q.shape[0] - 1,
        q.shape[0],
        k.shape[0],
        max_seqlen_q,
        max_seqlen_k,
        q.shape[1],
        k.shape[1],
        *(stride // _STRIDE_UNIT for x in (q, k, v) for stride in x.stride()[:2]),
        factor,
        factor * LOG2_E,
    )


def _constants(
    tile: Tile, q: Tensor, causal: bool, prefix_lengths: Tensor | None
) -> dict[str, int | bool | str]:
    return {
        "CAUSAL": causal,
        "PREFIX": prefix_lengths is not None,
        **_sizes(tile, q.shape[2], q.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _sizes(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    block_d = max(16, triton.next_power_of_2(head_dim))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "CHUNK": tile.chunk or block_d,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def compile_cases() -> Iterator[CompileCase]:
    """Every tile of the table, plain; in bfloat16 also with all masks at the usual head size."""
    pointers = {"q": "", "k": "", "v": "", "out": "", "lse": "fp32"}
    grads = {"grad_out": "", "grad_lse": "fp32", "delta": "fp32", "dq": ""}
    kernels = {
        "forward": (forward, pointers),
        "backward_queries": (backward_queries, pointers | grads),
        "backward_keys": (
            backward_keys,
            {"q": "", "k": "", "v": "", "lse": "fp32", "grad_out": "", "delta": "fp32",
             "dk": "", "dv": ""},
        ),
    }  # fmt: skip
    lengths = {"cu_q": "*i32", "cu_k": "*i32", "prefixes": "*i32"}
    numbers = ["num_sequences", "total_q", "total_k", "max_q", "max_k", "num_heads", "num_kv_heads"]
    numbers += [f"{name}_{of}" for name in "qkv" for of in ("token", "head")]
    for name, (kernel, tensors) in kernels.items():
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for head_dim, longest, masked in (
                (64, 64, False), (64, 577, False), (64, 577, True), (128, 577, False),
                (256, 577, False),
            ):  # fmt: skip
                short_matters = name == "forward" and dtype == torch.bfloat16
                if (longest == 64 and not short_matters) or (masked and dtype == torch.float32):
                    continue
                tile = tile_of(name, head_dim, dtype, longest, masked)
                signature = {key: f"*{kind or short}" for key, kind in tensors.items()}
                signature |= lengths | dict.fromkeys(numbers, "i32")
                signature |= {"scale": "fp32", "scale_log2": "fp32"}
                constexprs: dict[str, int | bool | str] = {"CAUSAL": masked, "PREFIX": masked}
                if name == "backward_queries":
                    constexprs["HAS_GRAD_LSE"] = masked
                yield CompileCase(
                    f"{name} {short} head_dim={head_dim} max_seqlen={longest}"
                    f"{' prefix' if masked else ''}",
                    kernel,
                    signature | dict.fromkeys(constexprs, "constexpr"),
                    constexprs | _sizes(tile, head_dim, dtype),
                    tile.num_warps,
                    tile.num_stages,
                )

"""Peers of packed_attention: self-attention of sequences of given lengths, no mask but their ends.

A peer has its own layout of q, k and v, as a model that uses it would hold them, so changing the
layout is no part of its time.
- `sdpa_padded`: scaled_dot_product_attention of a batch padded to its longest sequence, with a mask
  of the keys.
- `sdpa`: the same without a mask, where all lengths are equal: torch may take its fused kernels.
- `flex`: FlexAttention with a document mask, compiled; the mask is made beforehand.
- `varlen`: torch.nn.attention.varlen, on CUDA.
- `nested`: scaled_dot_product_attention of jagged nested tensors, on CUDA.
Legend: T tokens, H heads, D head_dim, S sequences, L longest.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.compiling import compiled


class Peer(NamedTuple):
    """`lay_out` makes its layout of a packed (T, H, D), `attend` computes, `pack` is the way back.

    Call attend on what lay_out gave for q, k and v; it is differentiable.
    """

    lay_out: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]


def available(
    device: str, lengths: Sequence[int], dtype: torch.dtype, *, backward: bool
) -> dict[str, Peer]:
    """The peers that run on `device` with these lengths, by name."""
    reasons = missing(device, lengths, dtype, backward=backward)
    return {name: make(device, lengths) for name, make in PEERS.items() if name not in reasons}


def missing(
    device: str, lengths: Sequence[int], dtype: torch.dtype, *, backward: bool
) -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    on_cuda = device.startswith("cuda")
    reasons = {}
    if min(lengths) == max(lengths):
        reasons["sdpa_padded"] = "equal lengths need no padding"
    else:
        reasons["sdpa"] = "the lengths differ"
    if backward and not on_cuda:
        reasons["flex"] = "FlexAttention has no backward on the CPU"
    if not on_cuda:
        reasons["varlen"] = "torch's varlen attention runs on CUDA only"
        reasons["nested"] = "on the CPU it has taken 4 to 20 times as long as padding"
    elif find_spec("torch.nn.attention.varlen") is None:
        reasons["varlen"] = f"torch {torch.__version__} has no varlen attention"
    elif dtype not in (torch.bfloat16, torch.float16):
        reasons["varlen"] = "torch's varlen attention takes 16-bit types only"
    return reasons


def _padded(device: str, lengths: Sequence[int]) -> Peer:
    longest = max(lengths)
    inside_SL = torch.arange(longest) < torch.tensor(lengths)[:, None]
    inside_SL = inside_SL.to(device)
    mask = None if min(lengths) == longest else inside_SL[:, None, None]

    def lay_out(x_THD: Tensor) -> Tensor:
        x_SLHD = x_THD.new_zeros((len(lengths), longest, *x_THD.shape[1:]))
        x_SLHD[inside_SL] = x_THD
        return x_SLHD

    def attend(*qkv: Tensor) -> Tensor:
        # Heads are a view of the projection's output, as in a model.
        heads = [x_SLHD.transpose(1, 2) for x_SLHD in qkv]
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    return Peer(lay_out, attend, lambda out_SLHD: out_SLHD[inside_SL])


def _flex(device: str, lengths: Sequence[int]) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = sum(lengths)
    document_T = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    mask = create_block_mask(
        lambda batch, head, query, key: document_T[query] == document_T[key],
        *(None, None, total, total),
        device=device,
    )
    attention: Any = compiled(flex_attention)

    def attend(*qkv: Tensor) -> Tensor:
        heads = [x_THD.transpose(0, 1)[None] for x_THD in qkv]
        out: Tensor = attention(*heads, block_mask=mask)
        return out[0].transpose(0, 1)

    return Peer(lambda x: x, attend, lambda x: x)


def _varlen(device: str, lengths: Sequence[int]) -> Peer:
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()
    longest = max(lengths)

    def attend(*qkv: Tensor) -> Tensor:
        out: Any = varlen_attn(*qkv, starts, starts, longest, longest)
        return out

    return Peer(lambda x: x, attend, lambda x: x)


def _nested(device: str, lengths: Sequence[int]) -> Peer:
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)

    def attend(*qkv: Tensor) -> Tensor:
        heads = [
            torch.nested.nested_tensor_from_jagged(
                x_THD, offsets=starts, min_seqlen=min(lengths), max_seqlen=max(lengths)
            ).transpose(1, 2)
            for x_THD in qkv
        ]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).values()

    return Peer(lambda x: x, attend, lambda x: x)


PEERS: dict[str, Callable[[str, Sequence[int]], Peer]] = {
    "sdpa_padded": _padded,
    "sdpa": _padded,
    "flex": _flex,
    "varlen": _varlen,
    "nested": _nested,
}

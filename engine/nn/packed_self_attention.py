"""Causal self-attention of packed rows, with grouped queries and rotary positions.

A row of L tokens holds documents one after another; a token sees those before it in its own
document. The core, `PackedSelfAttention.core`, is a plain function of q, k, v and the documents'
offsets, so that a layout in which a process holds a share of each row can put its own there.
One linear gives q, k and v. Its rows are ordered (kv group, its query heads|k|v, head_dim): a plain
split of dim 0 hands whole groups to a tensor-parallel rank, and the number of groups is read from
the activation. Left out: KV caches, windows, dropout.

Legend: B rows, L tokens of a row, D width, H query heads, G kv heads, K head_dim, S offsets of a
row's documents (their number + 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from carillon.engine.nn.norm import RMSNorm
from carillon.engine.nn.rope import rotate
from carillon.kernels.table import resolve

Core = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_within_documents(
    q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, offsets_BS: Tensor
) -> Tensor:
    """The core for whole rows, by the op packed_attention: (B, L, H, K).

    Offsets run from 0 to L; equal ones are empty documents.
    """
    num_rows, length = q_BLHK.shape[:2]
    begin_B1 = torch.arange(num_rows, device=offsets_BS.device, dtype=torch.int32)[:, None] * length
    # A row's last offset is the next row's first.
    starts = torch.cat([(offsets_BS[:, :-1] + begin_B1).flatten(), begin_B1[-1] + length])
    packed = [x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK)]
    attend = resolve("packed_attention", q_BLHK.device)
    out, _ = attend(*packed, starts, starts, length, length, True)
    result: Tensor = out.view(q_BLHK.shape)
    return result


class PackedSelfAttention(nn.Module):
    """Self-attention without biases: (B, L, D) -> (B, L, D).

    Source: Ainslie et al. 2023 (GQA), section 2.2. `qk_norm` is an RMSNorm over head_dim of each
    head's queries and keys before their turn, one gain shared by all heads: Dehghani et al. 2023
    (ViT-22B), section 2, with Qwen3's norm.
    """

    core: Core

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, *, qk_norm: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.heads_per_group = num_heads // num_kv_heads
        rows = num_kv_heads * (self.heads_per_group + 2) * self.head_dim
        self.qkv = nn.Linear(width, rows, bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.core = attend_within_documents

    def init_weights(
        self, *, std: float, residual_std: float, generator: Generator | None = None
    ) -> None:
        nn.init.normal_(self.qkv.weight, std=std, generator=generator)
        nn.init.normal_(self.out.weight, std=residual_std, generator=generator)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_weights()

    def forward(self, x_BLD: Tensor, rotations_BLJ: Tensor, offsets_BS: Tensor) -> Tensor:
        """`rotations_BLJ`: see engine/nn/rope.py."""
        heads = self.heads_per_group
        qkv = self.qkv(x_BLD).unflatten(-1, (-1, heads + 2, self.head_dim))
        q_BLGHK, k, v = qkv.split((heads, 1, 1), dim=-2)
        q, k, v = q_BLGHK.flatten(2, 3), k.squeeze(-2), v.squeeze(-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = rotate(q, rotations_BLJ), rotate(k, rotations_BLJ)
        y_BLD: Tensor = self.out(self.core(q, k, v, offsets_BS).flatten(2))
        return y_BLD

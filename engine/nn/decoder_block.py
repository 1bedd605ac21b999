"""A pre-norm block of a decoder: attention over packed rows, then a gated MLP or a mixture.

Nothing in a block is random, so a block can run again in the backward pass without RNG state.
Left out: dropout, post-norms.

Legend: B rows, L tokens of a row, D width, S offsets of a row's documents, J pairs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor, nn

from carillon.engine.nn.moe import Moe, MoeShape
from carillon.engine.nn.norm import RMSNorm
from carillon.engine.nn.packed_self_attention import PackedSelfAttention
from carillon.engine.nn.swiglu import SwiGlu


@dataclass(frozen=True, kw_only=True)
class DecoderBlockShape:
    """What all blocks of a stack share; `moe` none: every block has a dense MLP."""

    width: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    qk_norm: bool
    norm_eps: float
    moe: MoeShape | None


class DecoderBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (B, L, D) -> (B, L, D).

    Source: Touvron et al. 2023 (LLaMA), section 2.2; with a mixture, Jiang et al. 2024 (Mixtral),
    section 2.1.
    """

    def __init__(self, shape: DecoderBlockShape, *, dense: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.width, eps=shape.norm_eps)
        self.attention = PackedSelfAttention(
            shape.width,
            shape.num_heads,
            shape.num_kv_heads,
            qk_norm=shape.qk_norm,
            norm_eps=shape.norm_eps,
        )
        self.norm2 = RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp: SwiGlu | Moe
        if shape.moe is None or dense:
            self.mlp = SwiGlu(shape.width, shape.mlp_width)
        else:
            self.mlp = Moe(shape.moe)

    def init_weights(
        self, *, std: float, residual_std: float, generator: Generator | None = None
    ) -> None:
        self.norm1.init_weights()
        self.norm2.init_weights()
        self.attention.init_weights(std=std, residual_std=residual_std, generator=generator)
        self.mlp.init_weights(std=std, residual_std=residual_std, generator=generator)

    def forward(self, x_BLD: Tensor, rotations_BLJ: Tensor, offsets_BS: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), rotations_BLJ, offsets_BS)
        x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return x_BLD

"""A stack of pre-norm transformer blocks, used by every encoder.

Blocks stand in `.blocks` (nn.ModuleList), so that sharding, compilation and recompute can be
applied block by block from outside. With `activation_recompute` a block keeps only its input and
runs again in the backward pass: about a third more time for a depth-th of the memory. Nothing in a
block is random, so no RNG state is saved. Left out: dropout, stochastic depth, layer scale.

Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from carillon.engine.nn.attention import SelfAttention, take_token
from carillon.engine.nn.mlp import Activation, Mlp
from carillon.engine.nn.norm import LayerNorm


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What all blocks of a stack share."""

    width: int
    num_heads: int
    mlp_width: int
    activation: Activation
    qk_norm: bool
    causal: bool


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, L, D) -> (B, L, D).

    Source: Radford et al. 2019 (GPT-2), section 2.3; Radford et al. 2021 (CLIP), section 2.4.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width)
        self.attention = SelfAttention(
            shape.width, shape.num_heads, causal=shape.causal, qk_norm=shape.qk_norm
        )
        self.norm2 = LayerNorm(shape.width)
        self.mlp = Mlp(shape.width, shape.mlp_width, activation=shape.activation)

    def forward(
        self, x_BLD: Tensor, mask: Tensor | None = None, only: Tensor | int | None = None
    ) -> Tensor:
        """With `only` (an index (B,), or one for all), that token of each sequence: (B, 1, D)."""
        attended = self.attention(self.norm1(x_BLD), mask, only)
        x_BLD = attended + (x_BLD if only is None else take_token(x_BLD, only))
        x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return x_BLD


def only(blocks: nn.ModuleList, wanted: range) -> nn.ModuleList:
    """Those blocks, under the names that they have among all."""
    kept = nn.ModuleList()
    for index, block in enumerate(blocks):
        kept.add_module(str(index), block if index in wanted else None)
    return kept


class Transformer(nn.Module):
    """`depth` blocks in a row: (B, L, D) -> (B, L, D).

    Where one token is pooled, nothing of the last block but its keys and values is needed of the
    others. `pool_token` (an index (B,), or one for all) skips that work: (B, L, D) -> (B, 1, D),
    the same values and gradients for 3/4 of the last block less. In a causal stack it needs
    `pool_mask`, which hides what follows the token. Of a stack that was cut into pieces
    (`only`), the blocks that are left run.
    """

    def __init__(self, shape: BlockShape, depth: int) -> None:
        super().__init__()
        self.shape = shape
        self.activation_recompute = False
        self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))

    def init_weights(self, generator: Generator | None = None) -> None:
        """Normal weights, zero biases, unit gains.

        The layers that write into the residual stream are scaled down by sqrt(2 depth).
        Source: OpenAI's CLIP, CLIP.initialize_parameters (there for text; here for both towers).
        """
        width = self.shape.width
        residual_std = width**-0.5 * (2 * len(self.blocks)) ** -0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            block.norm1.init_weights()
            block.norm2.init_weights()
            block.attention.init_weights(
                qkv_std=width**-0.5, out_std=residual_std, generator=generator
            )
            block.mlp.init_weights(
                fc1_std=(2 * width) ** -0.5, fc2_std=residual_std, generator=generator
            )

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        pool_token: Tensor | int | None = None,
        pool_mask: Tensor | None = None,
    ) -> Tensor:
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            if not isinstance(block, Block):  # none: another stage has it
                continue
            pools = index == last and pool_token is not None
            arguments = (x_BLD, pool_mask, pool_token) if pools else (x_BLD, mask, None)
            if self.activation_recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLD = block(*arguments)
        return x_BLD

    def costs(self, num_tokens: int, *, pooled: bool) -> list[int]:
        """Forward matmul FLOPs of each block for one sequence, attention counted in full (causal
        or not)."""
        width, tokens, depth = self.shape.width, num_tokens, len(self.blocks)
        qkv, per_query = 3 * width * width, width * width + 2 * width * self.shape.mlp_width
        queries = [tokens] * (depth - 1) + [1 if pooled else tokens]
        return [2 * (tokens * qkv + num * (per_query + 2 * tokens * width)) for num in queries]

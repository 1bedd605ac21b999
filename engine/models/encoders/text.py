"""The text transformer: causal with end-of-text pooling (CLIP), or bidirectional (BERT-like).

A batch is padded only to its longest caption; positions are learned and sliced. A causal encoder
needs no key mask: what follows a caption's last token cannot be seen from it. A bidirectional one
masks the padding as keys. Left out: packed sequences, which come with their own attention op.

Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from carillon.engine.config import setting
from carillon.engine.nn.mlp import ACTIVATIONS, Activation
from carillon.engine.nn.norm import LayerNorm
from carillon.engine.nn.transformer import BlockShape, Transformer

TextPool = Literal["eot", "mean", "first"]


@dataclass(frozen=True, kw_only=True)
class TextOverrides:
    """Fields of the text backbone to change; what is left out keeps the backbone's value."""

    context: int | None = setting(
        None, "Longest caption in tokens, start and end included.", min=3, max=131_072
    )
    width: int | None = setting(None, "Features of a token.", min=1, max=65_536)
    depth: int | None = setting(None, "Number of transformer blocks.", min=1, max=1024)
    num_heads: int | None = setting(
        None, "Attention heads; must divide the width.", min=1, max=1024
    )
    mlp_width: int | None = setting(None, "Hidden features of a block's MLP.", min=1, max=524_288)
    causal: bool | None = setting(None, "A token sees only what stands before it.")
    pool: TextPool | None = setting(
        None, "End-of-text token, mean of the tokens, or the first token."
    )
    activation: Activation | None = setting(None, "The MLP's activation.")
    qk_norm: bool | None = setting(None, "Normalise each head's queries and keys.")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text transformer, every field resolved."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    context: int = 77
    causal: bool = True
    pool: TextPool = "eot"
    activation: Activation = "gelu"
    qk_norm: bool = False

    def check(self) -> Iterable[str]:
        if self.width % self.num_heads:
            yield f"width {self.width} is not a multiple of num_heads {self.num_heads}"
        if self.causal and self.pool == "first":
            yield "pool first sees nothing of a causal text; set pool to eot, or causal to false"
        if self.activation not in ACTIVATIONS:
            yield f"activation {self.activation!r} given, allowed: {', '.join(ACTIVATIONS)}"


class TextTransformer(nn.Module):
    """Text encoder: tokens (B, L), lengths (B,) -> pooled features (B, D).

    Source: Radford et al. 2021 (CLIP), section 2.4.
    """

    EMBEDDING = ("token", "position")
    HEAD = ("post_norm",)

    def __init__(self, config: TextConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        shape = BlockShape(
            width=config.width,
            num_heads=config.num_heads,
            mlp_width=config.mlp_width,
            activation=config.activation,
            qk_norm=config.qk_norm,
            causal=config.causal,
        )
        self.transformer = Transformer(shape, config.depth)
        self.post_norm = LayerNorm(config.width)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Source: OpenAI's CLIP, CLIP.initialize_parameters."""
        nn.init.normal_(self.token.weight, std=0.02, generator=generator)
        nn.init.normal_(self.position, std=0.01, generator=generator)
        self.transformer.init_weights(generator)
        self.post_norm.init_weights()

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Raises ValueError for tokens longer than the context."""
        return self.finish(self.encode(self.embed(tokens_BL), lengths_B), lengths_B)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """What the first block takes."""
        length = tokens_BL.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"tokens of length {length} given; this model takes at most {self.config.context}"
            )
        x_BLD: Tensor = self.token(tokens_BL) + self.position[:length]
        return x_BLD

    def encode(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The blocks: (B, L, D), or (B, 1, D) where one token is pooled."""
        keys = _valid(x_BLD.shape[1], lengths_B)[:, None, None]
        mask = None if self.config.causal else keys
        encoded: Tensor
        if self.config.pool == "mean":
            encoded = self.transformer(x_BLD, mask)
        else:
            token = lengths_B - 1 if self.config.pool == "eot" else 0
            encoded = self.transformer(x_BLD, mask, pool_token=token, pool_mask=keys)
        return encoded

    def finish(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Norm and pool, after the last block: (B, D)."""
        pooled_BD: Tensor
        if self.config.pool == "mean":
            valid_BL = _valid(x_BLD.shape[1], lengths_B)
            pooled_BD = (self.post_norm(x_BLD) * valid_BL[..., None]).sum(1) / lengths_B[:, None]
        else:
            pooled_BD = self.post_norm(x_BLD.squeeze(1))
        return pooled_BD

    def costs(self, length: int) -> list[int]:
        """Forward matmul FLOPs of a caption of `length` tokens: of the embedding (a look-up), of
        each block, of the pool."""
        return [0, *self.transformer.costs(length, pooled=self.config.pool != "mean"), 0]

    def flops(self, length: int) -> int:
        """Forward matmul FLOPs of one caption of `length` tokens."""
        return sum(self.costs(length))


def _valid(length: int, lengths_B: Tensor) -> Tensor:
    """Which of `length` tokens are no padding: (B, L)."""
    return torch.arange(length, device=lengths_B.device) < lengths_B[:, None]

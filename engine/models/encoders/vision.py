"""The vision transformer (ViT).

Patches are cut by reshaping and embedded by one linear: equal to the usual strided convolution with
its weight flattened over (channel, row, column), and faster than it on a CPU. The pool decides the
tokens: only "class" has a class token. Registers follow the patches and have no position.
Left out: pictures of several sizes in one batch (positions belong to one image_size).

Legend: B batch, C channels, L tokens, D width, P patches, E values of a flattened patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from carillon.engine.config import setting
from carillon.engine.nn.attention import AttentionPool
from carillon.engine.nn.mlp import ACTIVATIONS, Activation
from carillon.engine.nn.norm import LayerNorm
from carillon.engine.nn.transformer import BlockShape, Transformer

VisionPool = Literal["class", "mean", "attention"]
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class VisionOverrides:
    """Fields of the vision backbone to change; what is left out keeps the backbone's value."""

    image_size: int | None = setting(
        None, "Height and width of the pictures in pixels.", min=1, max=16_384
    )
    patch_size: int | None = setting(
        None, "Height and width of a patch in pixels.", min=1, max=16_384
    )
    width: int | None = setting(None, "Features of a token.", min=1, max=65_536)
    depth: int | None = setting(None, "Number of transformer blocks.", min=1, max=1024)
    num_heads: int | None = setting(
        None, "Attention heads; must divide the width.", min=1, max=1024
    )
    mlp_width: int | None = setting(None, "Hidden features of a block's MLP.", min=1, max=524_288)
    pool: VisionPool | None = setting(
        None, "Class token, mean of the patches, or attention by one learned query."
    )
    activation: Activation | None = setting(None, "The MLP's activation.")
    qk_norm: bool | None = setting(None, "Normalise each head's queries and keys.")
    num_registers: int | None = setting(
        None, "Extra learned tokens beside the patches.", min=0, max=1024
    )
    pre_norm: bool | None = setting(None, "A LayerNorm before the first block, as in CLIP.")
    patch_bias: bool | None = setting(None, "A bias in the patch embedding.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT, every field resolved."""

    width: int
    depth: int
    num_heads: int
    patch_size: int
    mlp_width: int
    image_size: int = 224
    pool: VisionPool = "class"
    activation: Activation = "gelu"
    qk_norm: bool = False
    num_registers: int = 0
    pre_norm: bool = True
    patch_bias: bool = False

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_patches + int(self.pool == "class") + self.num_registers

    def check(self) -> Iterable[str]:
        if self.width % self.num_heads:
            yield f"width {self.width} is not a multiple of num_heads {self.num_heads}"
        if self.image_size % self.patch_size:
            yield (
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size};"
                f" take {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.activation not in ACTIVATIONS:
            yield f"activation {self.activation!r} given, allowed: {', '.join(ACTIVATIONS)}"


class VisionTransformer(nn.Module):
    """ViT encoder: images (B, 3, S, S) -> pooled features (B, D).

    Source: Dosovitskiy et al. 2021; with pre_norm as in Radford et al. 2021 (CLIP), section 2.4;
    registers of Darcet et al. 2024.
    """

    EMBEDDING = ("patch", "class_token", "position", "registers", "pre_norm")
    HEAD = ("post_norm", "pool")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch_values = CHANNELS * config.patch_size**2
        self.patch = nn.Linear(patch_values, config.width, bias=config.patch_bias)
        has_class = config.pool == "class"
        self.class_token = nn.Parameter(torch.empty(config.width)) if has_class else None
        self.position = nn.Parameter(torch.empty(config.num_patches + has_class, config.width))
        registers = torch.empty(config.num_registers, config.width)
        self.registers = nn.Parameter(registers) if config.num_registers else None
        self.pre_norm = LayerNorm(config.width) if config.pre_norm else None
        self.transformer = Transformer(_block_shape(config), config.depth)
        self.post_norm = LayerNorm(config.width)
        self.pool = (
            AttentionPool(config.width, config.num_heads, config.mlp_width, config.activation)
            if config.pool == "attention"
            else None
        )

    def init_weights(self, generator: Generator | None = None) -> None:
        """Source: OpenAI's CLIP (tokens and positions width^-0.5, patches as torch's Conv2d)."""
        bound = self.patch.in_features**-0.5
        nn.init.uniform_(self.patch.weight, -bound, bound, generator=generator)
        if self.patch.bias is not None:
            nn.init.zeros_(self.patch.bias)
        for tokens in (self.class_token, self.position, self.registers):
            if tokens is not None:
                nn.init.normal_(tokens, std=self.config.width**-0.5, generator=generator)
        for norm in (self.pre_norm, self.post_norm):
            if norm is not None:
                norm.init_weights()
        self.transformer.init_weights(generator)
        if self.pool is not None:
            self.pool.init_weights(generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Raises ValueError for images of another size or number of channels."""
        return self.finish(self.encode(self.embed(images_BCHW)))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """What the first block takes."""
        x_BLD = self._embed(images_BCHW)
        return x_BLD if self.pre_norm is None else self.pre_norm(x_BLD)

    def encode(self, x_BLD: Tensor) -> Tensor:
        """The blocks: (B, L, D), or (B, 1, D) where one token is pooled."""
        encoded: Tensor = self.transformer(
            x_BLD, pool_token=0 if self.config.pool == "class" else None
        )
        return encoded

    def finish(self, x_BLD: Tensor) -> Tensor:
        """Norm and pool, after the last block: (B, D)."""
        pooled_BD: Tensor
        if self.config.pool == "class":
            pooled_BD = self.post_norm(x_BLD.squeeze(1))
            return pooled_BD
        x_BLD = self.post_norm(x_BLD[:, : self.config.num_patches])
        pooled_BD = x_BLD.mean(1) if self.pool is None else self.pool(x_BLD)
        return pooled_BD

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        x_BLD: Tensor = self.patch(patches(images_BCHW, self.config))
        position = self.position
        if self.class_token is not None:
            first = (self.class_token + position[0]).expand(x_BLD.shape[0], 1, -1)
            x_BLD = torch.cat([first, x_BLD + position[1:]], dim=1)
        else:
            x_BLD = x_BLD + position
        if self.registers is None:
            return x_BLD
        return torch.cat([x_BLD, self.registers.expand(x_BLD.shape[0], -1, -1)], dim=1)

    def costs(self, image_size: int) -> list[int]:
        """Forward matmul FLOPs of one picture: of the embedding, of each block, of the pool."""
        config = replace(self.config, image_size=image_size)
        patches = 2 * config.num_patches * self.patch.in_features * config.width
        pool = 0
        if self.pool is not None:
            width, tokens = config.width, config.num_patches
            projections = 2 * tokens * width * width + width * width
            pool = 2 * (projections + 2 * width * config.mlp_width + 2 * tokens * width)
        blocks = self.transformer.costs(config.num_tokens, pooled=config.pool == "class")
        return [patches, *blocks, pool]

    def flops(self, image_size: int) -> int:
        """Forward matmul FLOPs of one picture, pooling included."""
        return sum(self.costs(image_size))


def patches(images_BCHW: Tensor, config: VisionConfig) -> Tensor:
    """Cut (B, 3, S, S) into flattened patches (B, P, 3 * patch_size**2), row by row."""
    size, patch = config.image_size, config.patch_size
    if images_BCHW.shape[1:] != (CHANNELS, size, size):
        raise ValueError(
            f"images of shape {tuple(images_BCHW.shape)} given; this model takes"
            f" (batch, {CHANNELS}, {size}, {size})"
        )
    grid = size // patch
    cut = images_BCHW.reshape(-1, CHANNELS, grid, patch, grid, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, CHANNELS * patch * patch)


def _block_shape(config: VisionConfig) -> BlockShape:
    return BlockShape(
        width=config.width,
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        activation=config.activation,
        qk_norm=config.qk_norm,
        causal=False,
    )

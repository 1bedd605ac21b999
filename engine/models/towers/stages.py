"""A dual encoder in pieces: each tower by consecutive blocks, the scale and bias apart.

Single-device code: which process holds a piece, and how its output travels, is decided elsewhere
(engine/parallel/pipeline.py). The first piece of a tower has the embedding, the last one the norm,
the pool and the projection. Pieces share the model's parameters and bear its names, so checkpoints
and optimizer see one model. Once the whole model is let go, a piece keeps only its own parameters.

Legend: B batch, C channels, L tokens, D dims of the shared space or a tower's width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import Tensor, nn

from carillon.engine.data.transforms import normalize
from carillon.engine.models.encoders.text import TextTransformer
from carillon.engine.models.encoders.vision import VisionTransformer
from carillon.engine.models.towers.dual_encoder import DualEncoder, scale_and_bias, unit
from carillon.engine.nn.mlp import Mlp
from carillon.engine.nn.transformer import only

M = TypeVar("M", bound=nn.Module)
Tower = TypeVar("Tower", VisionTransformer, TextTransformer)


class Piece(nn.Module):
    """Consecutive blocks of a tower. The precision is the caller's, set as `autocast`."""

    def __init__(self, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext

    def tower(self) -> VisionTransformer | TextTransformer:
        raise NotImplementedError

    def blocks(self) -> Iterator[nn.Module]:
        return (block for block in self.tower().transformer.blocks if block is not None)

    def set_recompute(self, enabled: bool) -> None:
        self.tower().transformer.activation_recompute = enabled


class VisionPiece(Piece):
    """Raw pictures (B, S, S, C) or the piece before -> (B, L, D), at the end unit rows (B, D)."""

    def __init__(
        self, vision: VisionTransformer, projection: nn.Linear | Mlp | None, *, is_first: bool
    ) -> None:
        super().__init__(is_first)
        self.vision = vision
        self.vision_projection = projection

    def tower(self) -> VisionTransformer:
        return self.vision

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast():
            x_BLD = self.vision.embed(normalize(x)) if self.is_first else x
            x_BLD = self.vision.encode(x_BLD)
            if self.vision_projection is None:
                return x_BLD
            return unit(self.vision_projection, self.vision.finish(x_BLD))


class TextPiece(Piece):
    """Tokens (B, L) or the piece before -> (B, L, D), at the end unit rows (B, D)."""

    def __init__(
        self, text: TextTransformer, projection: nn.Linear | Mlp | None, *, is_first: bool
    ) -> None:
        super().__init__(is_first)
        self.text = text
        self.text_projection = projection

    def tower(self) -> TextTransformer:
        return self.text

    def forward(self, x: Tensor, lengths_B: Tensor) -> Tensor:
        with self.autocast():
            x_BLD = self.text.embed(x) if self.is_first else x
            x_BLD = self.text.encode(x_BLD, lengths_B)
            if self.text_projection is None:
                return x_BLD
            return unit(self.text_projection, self.text.finish(x_BLD, lengths_B))


class ScalePiece(nn.Module):
    """The learned scale and bias, as the loss takes them."""

    def __init__(self, logit_scale: nn.Parameter, logit_bias: nn.Parameter | None) -> None:
        super().__init__()
        self.logit_scale, self.logit_bias = logit_scale, logit_bias

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return scale_and_bias(self.logit_scale, self.logit_bias)


def pieces(
    model: DualEncoder, tower: str, split: Sequence[int], wanted: Sequence[int]
) -> list[VisionPiece] | list[TextPiece]:
    """Those pieces of a tower ("vision" or "text") that are wanted, in that order.

    `split` says how many blocks each piece has, from the first to the last.
    """
    last = len(split) - 1
    if tower == "vision":
        return [
            VisionPiece(
                _cut(model.vision, ranges(split)[index], index == 0, index == last),
                model.vision_projection if index == last else None,
                is_first=index == 0,
            )
            for index in wanted
        ]
    return [
        TextPiece(
            _cut(model.text, ranges(split)[index], index == 0, index == last),
            model.text_projection if index == last else None,
            is_first=index == 0,
        )
        for index in wanted
    ]


def ranges(split: Sequence[int]) -> list[range]:
    """The blocks of each piece, of how many it has."""
    return [range(start, stop) for start, stop in pairwise(accumulate(split, initial=0))]


def _cut(tower: Tower, blocks: range, is_first: bool, is_last: bool) -> Tower:
    piece = sharing_parameters(tower)
    piece.transformer.blocks = only(piece.transformer.blocks, blocks)
    dropped = (() if is_first else piece.EMBEDDING) + (() if is_last else piece.HEAD)
    for name in dropped:
        setattr(piece, name, None)
    return piece


def sharing_parameters(module: M) -> M:
    """A copy of the structure with the same parameters."""
    return copy.deepcopy(module, memo={id(value): value for value in module.parameters()})

"""A decoder in pieces, by consecutive blocks: the first has the embedding, the last norm and head.

Single-device code, as the dual encoder's pieces (stages.py). A piece has the model's own modules,
under the whole model's names.

Legend: B rows, L tokens of a row, D width, V vocabulary, S offsets of a row's documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from carillon.engine.models.towers.decoder import Decoder, through_blocks
from carillon.engine.models.towers.stages import ranges
from carillon.engine.nn.transformer import only


class DecoderPiece(nn.Module):
    """Tokens (B, L) or the piece before -> (B, L, D), at the end logits (B, L, V).

    The precision is the caller's, set as `autocast`.
    """

    def __init__(self, model: Decoder, wanted: range) -> None:
        super().__init__()
        self.config = model.config
        self.activation_recompute = model.activation_recompute
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        is_first, is_last = wanted.start == 0, wanted.stop == len(model.blocks)
        self.token = model.token if is_first else None
        self.blocks = only(model.blocks, wanted)
        self.norm = model.norm if is_last else None
        self.head = model.head if is_last else None

    def forward(self, x: Tensor, positions_BL: Tensor, offsets_BS: Tensor) -> Tensor:
        with self.autocast():
            x_BLD = x if self.token is None else self.token(x)
            x_BLD = through_blocks(self, x_BLD, positions_BL, offsets_BS)
            if self.norm is None or self.head is None:
                return x_BLD
            logits_BLV: Tensor = self.head(self.norm(x_BLD))
            return logits_BLV

    def own_blocks(self) -> Iterator[nn.Module]:
        return (block for block in self.blocks if block is not None)


def decoder_pieces(
    model: Decoder, split: Sequence[int], wanted: Sequence[int]
) -> list[DecoderPiece]:
    """Those pieces that are wanted, in that order; `split` says how many blocks each piece has."""
    return [DecoderPiece(model, ranges(split)[index]) for index in wanted]

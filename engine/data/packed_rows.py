"""What follows from where the documents of a packed row start: positions and labels of its tokens.

Legend: B rows, L tokens of a row, S offsets of a row's documents: their starts and its end, from 0
to L, padded with L (empty documents).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carillon.engine.data.balance import deal

IGNORED = -100  # the label of a token that has no next one


def positions(offsets_BS: Tensor, length: int) -> Tensor:
    """A token's place in its document: (B, L) int64."""
    starts_BS = offsets_BS.long()
    index = torch.arange(length, device=offsets_BS.device)
    index_BL = index.expand(len(offsets_BS), -1).contiguous()
    document_BL = torch.searchsorted(starts_BS, index_BL, right=True) - 1
    return index_BL - starts_BS.gather(1, document_BL)


def next_tokens(tokens_BL: Tensor, offsets_BS: Tensor) -> Tensor:
    """The next token of the same document, IGNORED at its end: (B, L) int64."""
    labels_BL = tokens_BL.roll(-1, dims=1).long()
    # A document ends before the next one's start; an empty one repeats the end of the row.
    ends_BS = (offsets_BS[:, 1:].long() - 1).clamp(min=0)
    return labels_BL.scatter(1, ends_BS, IGNORED)


class PackedRows(NamedTuple):
    """What a decoder and its loss take: whole rows, or a process's share of their tokens."""

    tokens: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    offsets: Tensor  # (B, S), those of whole rows always
    labels: Tensor  # (B, L)

    @staticmethod
    def of(tokens_BL: Tensor, offsets_BS: Tensor) -> PackedRows:
        """Positions and labels follow from where documents start."""
        place_BL = positions(offsets_BS, tokens_BL.shape[1])
        return PackedRows(tokens_BL, place_BL, offsets_BS, next_tokens(tokens_BL, offsets_BS))

    def attention_pairs(self) -> Tensor:
        """(query, key) pairs of each row, (B,) int64: what rows of equal length differ by."""
        lengths_BS = self.offsets.long().diff(dim=1)
        return (lengths_BS * (lengths_BS + 1) // 2).sum(1)

    def deal(self, num_ranks: int) -> list[PackedRows]:
        """The global batch's rows for each data rank, with as even an attention as they allow."""
        dealt = deal(self.attention_pairs().tolist(), num_ranks)
        return [PackedRows(*(x[own] for x in self)) for own in dealt]

    def split(self, num_rows: int) -> list[PackedRows]:
        """Parts of at most so many rows."""
        return [PackedRows(*p) for p in zip(*(torch.split(x, num_rows) for x in self), strict=True)]

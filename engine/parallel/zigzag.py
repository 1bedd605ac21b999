"""How packed rows are cut over context-parallel processes, so that causal work is even.

A row of L tokens is cut in 2 x size chunks of equal length; process r holds chunks r and
2 x size - 1 - r, one after the other. Under a causal mask a chunk's work grows with its place, and
an early chunk pairs with a late one. The same cut serves tokens, positions, labels and features.
Offsets of documents are never cut: each process knows those of whole rows. Within a share, tokens
of one document follow each other in order, so a share is a packed row too.
L must divide by 2 x size (a config whose rows do not is refused when it is loaded): rows are packed
to L already, and a padded one would count tokens that are none.
Source: the cut of Megatron-LM's and Brandon et al. 2023's ring (Striped Attention cuts finer).

Legend: B rows, L tokens, S starts of documents and the end, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carillon.engine.choices import divisors, either, multiples, nearest
from carillon.engine.data.packed_rows import PackedRows


class Zigzag(NamedTuple):
    """The cut of rows over `size` processes, as process `rank` sees it."""

    size: int
    rank: int

    def chunks_of(self, rank: int) -> tuple[int, int]:
        """The early and the late chunk of a process."""
        return rank, 2 * self.size - 1 - rank

    def share(self, x_BL: Tensor) -> Tensor:
        """This process's tokens of whole rows: (B, L, ...) -> (B, L / size, ...).

        Raises ValueError when L does not divide by 2 x size.
        """
        wrong = next(row_length_errors(x_BL.shape[1], self.size), None)
        if wrong is not None:
            raise ValueError(f"context parallelism: {wrong}")
        chunks = x_BL.chunk(2 * self.size, dim=1)
        return torch.cat([chunks[chunk] for chunk in self.chunks_of(self.rank)], dim=1)

    def share_of(self, rows: PackedRows) -> PackedRows:
        """This process's share of a batch; offsets stay those of whole rows."""
        return PackedRows(
            tokens=self.share(rows.tokens),
            positions=self.share(rows.positions),
            offsets=rows.offsets,
            labels=self.share(rows.labels),
        )

    def join(self, shares: Tensor) -> Tensor:
        """Whole rows from all shares in rank order: (size, B, L / size, ...) -> (B, L, ...)."""
        early, late = torch.unflatten(shares, 2, (2, -1)).unbind(2)
        return torch.cat([early, late.flip(0)]).transpose(0, 1).flatten(1, 2)

    def part(self, x_BL: Tensor) -> Tensor:
        """All shares of whole rows, in rank order: (B, L, ...) -> (size, B, L / size, ...)."""
        early, late = torch.unflatten(x_BL, 1, (2 * self.size, -1)).transpose(0, 1).chunk(2)
        return torch.cat([early, late.flip(0)], dim=2)

    def starts(self, offsets_BS: Tensor, chunks: Sequence[int], length: int) -> Tensor:
        """Where documents start among the tokens of `chunks`, rows one after another.

        `length` is that of a chunk. Shape: (B x S,), int32, for packed_attention; between two rows
        it has an empty document. Sizes do not depend on values, and nothing is read back.
        """
        inside = [(offsets_BS - chunk * length).clamp(0, length) for chunk in chunks]
        rows = torch.arange(offsets_BS.shape[0], device=offsets_BS.device) * len(chunks) * length
        return (torch.stack(inside).sum(0) + rows[:, None]).flatten().int()


def row_length_errors(length: int, size: int) -> Iterator[str]:
    """Why rows of `length` tokens cannot be cut over `size` processes; nothing where they can."""
    step = 2 * size
    if length % step:
        sizes = nearest(divisors(length // 2) if length % 2 == 0 else [], size)
        yield (
            f"cp: {size} given, but rows of {length} tokens do not divide into 2 x cp = {step} "
            f"chunks; use rows of {either(multiples(step, length))} tokens, or "
            f"cp={either(sizes)}"
        )

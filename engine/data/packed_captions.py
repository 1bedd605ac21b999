"""Captions packed into rows for a decoder: one row at each global position.

Row r holds the captions at places r x n to (r + 1) x n - 1 of the sample order, each as
`bos ... eos`, so what a row holds follows from its position alone. The caption that reaches the end
of the row is cut there, those after it are left out, and what stays free is padding: a last
document without labels. Trade-off: n is a setting; too few leave padding, too many leave text out.
Left out: filling rows from a window of documents, which the data plane brings.

Legend: B rows, L tokens of a row, S = n + 2 offsets: starts of n captions, of the padding, the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from carillon.engine.data.order import position_generator
from carillon.engine.data.packed_rows import IGNORED, PackedRows
from carillon.engine.data.positioned import FilteredSample, Positioned
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData


class Caption(NamedTuple):
    """A document of a row."""

    key: str
    text: str


class CaptionRows(NamedTuple):
    """One process's share of a global batch: rows, and whose captions are in them."""

    rows: PackedRows
    keys: list[str]
    bad: list[tuple[str, str]]
    num_filtered: int = 0

    def to(self, device: torch.device) -> CaptionRows:
        rows = PackedRows(*(part.to(device, non_blocking=True) for part in self.rows))
        return self._replace(rows=rows)

    def lengths(self) -> Tensor:
        """Tokens of each caption, 0 for one that was left out: (B x n,) int64."""
        return self.rows.offsets[:, :-1].long().diff(dim=1).flatten()

    def padding(self) -> Tensor:
        """Tokens of each row that are none of a caption: (B,) int64."""
        return self.rows.offsets[:, -2:].long().diff(dim=1).flatten()


class PackedCaptions(Positioned[CaptionRows]):
    """Global position -> row of `context` tokens."""

    def __init__(self, data: TrainingData, tokenizer: Tokenizer, *, context: int) -> None:
        super().__init__(data)
        self.context = context
        self._pack = Packing(tokenizer, self.config.augment.text.max_len or context, context)

    @property
    def num_per_epoch(self) -> int:
        return max(1, self.data.num_training // self.config.documents_per_row)

    def batch(self, positions: Sequence[int]) -> CaptionRows:
        num = self.config.documents_per_row
        places = [position * num + i for position in positions for i in range(num)]
        bad: list[tuple[str, str]] = []
        captions, num_filtered = self.draw(places, bad, self._caption_of)
        by_row = [captions[start : start + num] for start in range(0, len(captions), num)]
        rows = self._pack([[caption.text for caption in row] for row in by_row])
        return CaptionRows(rows, [caption.key for caption in captions], bad, num_filtered)

    def held_out_rows(self, most: int) -> PackedRows | None:
        """Rows of at most so many held-out captions, the same always; none where none is held out.

        Bad and filtered ones are passed over.
        """
        texts: list[str] = []
        for place in islice(self.data.validation_places(), most):
            try:
                raw = self.data.read(place)
                texts.append(self._caption_of(place.row, raw, "held out").text)
            except (SampleError, FilteredSample):
                continue
        num = self.config.documents_per_row
        full = [texts[start : start + num] for start in range(0, len(texts), num)]
        return self._pack([row + [""] * (num - len(row)) for row in full]) if full else None

    def _caption_of(self, position: int, raw: RawSample, purpose: str = "sample") -> Caption:
        generator = position_generator(self.seed, purpose, position)
        return Caption(raw.key, self.choose_caption(raw, generator)[1])


class Packing:
    """Texts to rows of tokens; an empty text takes no place."""

    def __init__(self, tokenizer: Tokenizer, most: int, length: int) -> None:
        self._tokenizer, self._most, self._length = tokenizer, most, length

    def __call__(self, texts: Sequence[Sequence[str]]) -> PackedRows:
        """As many texts for each row. `most` tokens are kept of one, bos and eos included."""
        packed = [self._row(row) for row in texts]
        rows = PackedRows.of(
            torch.tensor([tokens for tokens, _ in packed]),
            torch.tensor([offsets for _, offsets in packed], dtype=torch.int32),
        )
        index_L = torch.arange(self._length)
        padding_BL = index_L >= rows.offsets[:, -2:-1]
        return rows._replace(labels=rows.labels.masked_fill(padding_BL, IGNORED))

    def _row(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        tokenizer, tokens, offsets = self._tokenizer, list[int](), [0]
        for text in texts:
            if text and len(tokens) < self._length:
                ids = tokenizer.ids(text)[: self._most - 2]
                tokens += [tokenizer.bos_id, *ids, tokenizer.eos_id]
                del tokens[self._length :]
            offsets.append(len(tokens))
        padding = [tokenizer.pad_id] * (self._length - len(tokens))
        return tokens + padding, [*offsets, self._length]

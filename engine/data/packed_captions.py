"""Captions packed into rows for a decoder: one row at each global position.

A caption is a document of `bos ... eos`. What a row holds follows from the order (packed.py). What
stays free is padding: a last document without labels.
A row has room for a fixed number of documents, so no shape follows from what is in it.

Legend: B rows, L tokens of a row, S = n + 2 offsets: starts of n captions, of the padding, the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from carillon.engine.data.order import position_generator
from carillon.engine.data.packed import Filled, Packed
from carillon.engine.data.packed_rows import IGNORED, PackedRows
from carillon.engine.data.packing import Sizes, StreamState, pack_all
from carillon.engine.data.positioned import FilteredSample
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData

_MIN_DOCUMENT = 3  # bos, a token, eos


class Caption(NamedTuple):
    """A document of a row."""

    key: str
    ids: list[int]


class CaptionRows(NamedTuple):
    """One process's share of a global batch: rows, and whose captions are in them."""

    rows: PackedRows
    keys: list[str]
    bad: list[tuple[str, str]]
    num_filtered: int
    streams: Mapping[int, StreamState]

    def to(self, device: torch.device) -> CaptionRows:
        rows = PackedRows(*(part.to(device, non_blocking=True) for part in self.rows))
        return self._replace(rows=rows)

    def lengths(self) -> Tensor:
        """Tokens of each caption, 0 where a row has fewer: (B x n,) int64."""
        return self.rows.offsets[:, :-1].long().diff(dim=1).flatten()

    def padding(self) -> Tensor:
        """Tokens of each row that are none of a caption: (B,) int64."""
        return self.rows.offsets[:, -2:].long().diff(dim=1).flatten()


class PackedCaptions(Packed[CaptionRows, Caption]):
    """Global position -> row of `context` tokens."""

    def __init__(self, data: TrainingData, tokenizer: Tokenizer, *, context: int) -> None:
        most = min(data.config.packing.max_documents, context // _MIN_DOCUMENT)
        super().__init__(data, (context, most))
        self._tokenizer = tokenizer
        self._most = min(self.config.augment.text.max_len or context, context)
        self._rows = Rows(tokenizer, context, most)

    def sample_of(self, position: int, raw: RawSample, purpose: str = "sample") -> Caption:
        generator = position_generator(self.seed, purpose, position)
        tokenizer, text = self._tokenizer, self.choose_caption(raw, generator)[1]
        with self.board.stage("transform"):
            ids = tokenizer.ids(text)[: self._most - 2]
        return Caption(raw.key, [tokenizer.bos_id, *ids, tokenizer.eos_id])

    def sizes_of(self, sample: Caption) -> Sizes:
        return len(sample.ids), 1

    def collate(self, filled: Filled[Caption]) -> CaptionRows:
        rows = self._rows(filled.packs)
        keys = [caption.key for pack in filled.packs for caption in pack]
        return CaptionRows(rows, keys, filled.bad, filled.num_filtered, filled.streams)

    def held_out_rows(self, most: int) -> PackedRows | None:
        """Rows of at most so many held-out captions, the same always; none where none is held out.

        Bad and filtered ones are passed over.
        """
        captions: list[Caption] = []
        for place in islice(self.data.validation_places(), most):
            try:
                raw = self.data.read(place)
                captions.append(self.sample_of(place.row, raw, "held out"))
            except (SampleError, FilteredSample):
                continue
        return self._rows(pack_all(captions, self.sizes_of, self.budget)) if captions else None


class Rows:
    """Documents to rows of tokens."""

    def __init__(self, tokenizer: Tokenizer, length: int, max_documents: int) -> None:
        self._tokenizer, self._length, self._most = tokenizer, length, max_documents

    def __call__(self, packs: Sequence[Sequence[Caption]]) -> PackedRows:
        packed = [self._row(pack) for pack in packs]
        rows = PackedRows.of(
            torch.tensor([tokens for tokens, _ in packed]),
            torch.tensor([offsets for _, offsets in packed], dtype=torch.int32),
        )
        index_L = torch.arange(self._length)
        padding_BL = index_L >= rows.offsets[:, -2:-1]
        return rows._replace(labels=rows.labels.masked_fill(padding_BL, IGNORED))

    def _row(self, pack: Sequence[Caption]) -> tuple[list[int], list[int]]:
        tokens, offsets = list[int](), [0]
        for caption in pack:
            tokens += caption.ids
            offsets.append(len(tokens))
        offsets += [len(tokens)] * (self._most - len(pack))
        padding = [self._tokenizer.pad_id] * (self._length - len(tokens))
        return tokens + padding, [*offsets, self._length]

"""Captions packed into rows for a decoder: one row at each global position.

A caption is a document of `bos ... eos`. Row position p is pack p // S of stream p % S
(packing.py), where S is the rows of a batch times `data.packing.streams`, so what a row holds
follows from the order alone. What stays free is padding: a last document without labels.
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
from carillon.engine.data.packed_rows import IGNORED, PackedRows
from carillon.engine.data.packing import Sizes, Stream, StreamState, pack_all
from carillon.engine.data.positioned import FilteredSample, Positioned
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.stages import StageBoard
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


class PackedCaptions(Positioned[CaptionRows]):
    """Global position -> row of `context` tokens."""

    def __init__(self, data: TrainingData, tokenizer: Tokenizer, *, context: int) -> None:
        super().__init__(data)
        packing = self.config.packing
        self.turns = packing.streams
        self.num_streams = packing.streams * self.config.batch_size
        self._tokenizer = tokenizer
        self._most = min(self.config.augment.text.max_len or context, context)
        self._rows = Rows(tokenizer, context, min(packing.max_documents, context // _MIN_DOCUMENT))
        self._states: Mapping[int, StreamState] = {}
        self._streams: dict[int, Stream[Caption]] = {}
        self._bad: list[tuple[str, str]] = []
        self._num_filtered = 0

    def start(self, streams: Mapping[int, StreamState], board: StageBoard) -> None:
        super().start(streams, board)
        self._states, self._streams = dict(streams), {}

    def batch(self, positions: Sequence[int]) -> CaptionRows:
        streams = {p % self.num_streams: self._stream(p % self.num_streams) for p in positions}
        self._bad, self._num_filtered = [], 0
        packs = []
        for position in positions:
            number, stream = divmod(position, self.num_streams)
            assert streams[stream].packs == number, "a stream gives its packs in order"
            packs.append(streams[stream].next_pack())
        with self.board.stage("collate"):
            rows = self._rows(packs)
        return CaptionRows(
            rows,
            [caption.key for pack in packs for caption in pack],
            self._bad,
            self._num_filtered,
            {number: stream.state for number, stream in streams.items()},
        )

    def held_out_rows(self, most: int) -> PackedRows | None:
        """Rows of at most so many held-out captions, the same always; none where none is held out.

        Bad and filtered ones are passed over.
        """
        captions: list[Caption] = []
        for place in islice(self.data.validation_places(), most):
            try:
                raw = self.data.read(place)
                captions.append(self._caption_of(place.row, raw, "held out"))
            except (SampleError, FilteredSample):
                continue
        return self._rows(pack_all(captions, _sizes, self._rows.budget)) if captions else None

    def _stream(self, number: int) -> Stream[Caption]:
        def sample(index: int) -> Caption:
            place = index * self.num_streams + number
            (caption,), num_filtered = self.draw([place], self._bad, self._caption_of)
            self._num_filtered += num_filtered
            return caption

        if number not in self._streams:
            self._streams[number] = Stream(
                sample,
                _sizes,
                budget=self._rows.budget,
                window=self.config.packing.window,
                state=self._states.get(number),
            )
        return self._streams[number]

    def _caption_of(self, position: int, raw: RawSample, purpose: str = "sample") -> Caption:
        generator = position_generator(self.seed, purpose, position)
        tokenizer, text = self._tokenizer, self.choose_caption(raw, generator)[1]
        with self.board.stage("transform"):
            ids = tokenizer.ids(text)[: self._most - 2]
        return Caption(raw.key, [tokenizer.bos_id, *ids, tokenizer.eos_id])


def _sizes(caption: Caption) -> Sizes:
    return len(caption.ids), 1


class Rows:
    """Documents to rows of tokens."""

    def __init__(self, tokenizer: Tokenizer, length: int, max_documents: int) -> None:
        self._tokenizer, self._length, self._most = tokenizer, length, max_documents

    @property
    def budget(self) -> Sizes:
        """Tokens and documents of a row."""
        return self._length, self._most

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

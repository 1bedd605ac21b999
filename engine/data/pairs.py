"""Pairs of a picture and a caption, for a dual encoder: one at each global position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.order import position_generator
from carillon.engine.data.packing import StreamState
from carillon.engine.data.pair_ids import NO_ID, pair_id
from carillon.engine.data.positioned import Positioned
from carillon.engine.data.samples import RawSample, SampleError
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData
from carillon.engine.data.transforms import Picture, needed_side, train_transform


class TrainingSample(NamedTuple):
    position: int
    key: str
    image: Picture
    caption: str
    language: str
    pair_id: int


class Batch(NamedTuple):
    """One process's share of a global batch, in position order.

    Shapes: images (B, S, S, 3) uint8, tokens (B, L) int64, lengths (B,) int64.
    `bad` holds (key, reason) of the bad samples that were replaced, `num_filtered` says how many
    sound ones were. `ids` (B,) int64 says which pairs are no negatives of each other: those that
    have it equal, and not below 0; none where nothing says so.
    """

    images: Tensor
    tokens: Tensor
    lengths: Tensor
    keys: list[str]
    languages: list[str]
    bad: list[tuple[str, str]]
    num_filtered: int = 0
    ids: Tensor | None = None

    @property
    def streams(self) -> Mapping[int, StreamState]:
        return {}

    def to(self, device: torch.device) -> Batch:
        return self._replace(
            images=self.images.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            ids=self.ids.to(device, non_blocking=True) if self.ids is not None else None,
        )

    def microbatches(self, size: int) -> list[Batch]:
        """Consecutive parts of `size` pairs (the last may be shorter)."""
        if size >= len(self.keys):
            return [self]
        return [self._part(start, start + size) for start in range(0, len(self.keys), size)]

    def _part(self, start: int, stop: int) -> Batch:
        return Batch(
            images=self.images[start:stop],
            tokens=self.tokens[start:stop],
            lengths=self.lengths[start:stop],
            keys=self.keys[start:stop],
            languages=self.languages[start:stop],
            bad=[],
            ids=self.ids[start:stop] if self.ids is not None else None,
        )


class PositionedSamples(Positioned[Batch]):
    """Global position -> pair."""

    def __init__(
        self,
        data: TrainingData,
        tokenizer: Tokenizer,
        *,
        size: int,
        context: int,
        same_field: str | None = None,
    ) -> None:
        super().__init__(data)
        self.tokenizer, self.size, self.same_field = tokenizer, size, same_field
        self._min_side = needed_side(size, self.config.augment.image)
        self.context = min(self.config.augment.text.max_len or context, context)

    def batch(self, positions: Sequence[int]) -> Batch:
        bad: list[tuple[str, str]] = []
        samples, num_filtered = self.draw(positions, bad, self._sample_of)
        with self.board.stage("collate"):
            tokens, lengths = self.tokenizer.encode([s.caption for s in samples], self.context)
            images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        keys = [sample.key for sample in samples]
        languages = [sample.language for sample in samples]
        ids = torch.tensor([sample.pair_id for sample in samples]) if self.same_field else None
        return Batch(images, tokens, lengths, keys, languages, bad, num_filtered, ids)

    def _sample_of(self, position: int, raw: RawSample) -> TrainingSample:
        generator = position_generator(self.seed, "sample", position)
        language, caption = self.choose_caption(raw, generator)
        same = pair_id(raw, self.same_field) if self.same_field is not None else NO_ID
        media = raw.medium("image")
        try:
            picture = self.decoded(decode_image, "image", media, min_side=self._min_side)
        except ValueError as error:
            raise SampleError(raw.key, str(error)) from None
        with self.board.stage("transform"):
            image = train_transform(picture, self.size, self.config.augment.image, generator)
        return TrainingSample(position, raw.key, image, caption, language, same)

"""Finds videos that show the same: stored anew, resized, or cropped by a tenth of a side.

Eight frames at even shares of a video are compared as near_pictures compares pictures, all at one
view; the median over the frames must hold the limits. Left out: cuts of a video, other speeds, and
its sound (near_sounds has members of sound alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.alignment import likeness
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.near_pairs import NearPair, near_pairs
from carillon.engine.data.curate.picture_signature import (
    SIGNATURE_BYTES,
    VIEWS,
    picture_signature,
    view_vectors,
)
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)
from carillon.engine.data.decode.frame_choice import UniformFrames
from carillon.engine.data.decode.video import decode_video

NUM_FRAMES = 8
_SIZE = 128  # pixels of the shorter side
_BATCH_PAIRS = 128


@dataclass(frozen=True, kw_only=True)
class NearVideos(SetStage):
    """Keeps one of the videos that show the same."""

    type: Literal["near_videos"] = setting("near_videos", "Kind of stage.")
    min_cosine: float = setting(
        0.8, "How near two vectors must come before the frames are compared.", min=0.5, max=1
    )
    min_correlation: float = setting(
        0.93, "The least median correlation of frames laid over each other.", min=0, max=1
    )
    max_patch: float = setting(
        28.0, "The greatest median difference of a frame's worst patch, of 255.", min=0, max=255
    )
    max_colour: float = setting(
        8.0, "The greatest median difference of colour, in levels of 255.", min=0, max=255
    )

    score_names: ClassVar[tuple[str, ...]] = ("correlation",)

    def examine(self, item: Item) -> Finding | None:
        if not item.has("video"):
            return None
        frames = decode_video(item.medium("video"), UniformFrames(NUM_FRAMES), size=_SIZE).frames
        # A video of fewer frames stands for itself, each of them as long as it lasts.
        chosen = [frames[at * len(frames) // NUM_FRAMES] for at in range(NUM_FRAMES)]
        return Finding(signature=b"".join(map(picture_signature, chosen)))

    def decide(self, population: Population) -> Decisions:
        return keep_first(self._pairs(population), population)

    def _pairs(self, population: Population) -> Iterator[tuple[int, int, float]]:
        rows = population.rows()
        if len(rows) < 2:
            return

        def views(block: slice) -> list[Any]:
            frames = population.matrix(rows[block]).reshape(-1, SIGNATURE_BYTES)
            return [_joined(frames, view) for view in range(len(VIEWS))]

        vectors = _joined(population.matrix(rows).reshape(-1, SIGNATURE_BYTES), 0)
        near = near_pairs(vectors, views, min_cosine=self.min_cosine)
        while batch := list(islice(near, _BATCH_PAIRS)):
            yield from self._alike(population, rows, batch)

    def _alike(
        self, population: Population, rows: Any, batch: list[NearPair]
    ) -> Iterator[tuple[int, int, float]]:
        ones = population.matrix(rows[[pair.one for pair in batch]])
        others = population.matrix(rows[[pair.other for pair in batch]])
        views = np.repeat([pair.view for pair in batch], NUM_FRAMES)
        shape = (-1, SIGNATURE_BYTES)
        measured = likeness(ones.reshape(shape), others.reshape(shape), views)
        medians = [np.median(one.reshape(-1, NUM_FRAMES), axis=1) for one in measured]
        for pair, correlation, patch, colour in zip(batch, *medians, strict=True):
            passes = correlation >= self.min_correlation and patch <= self.max_patch
            if passes and colour <= self.max_colour:
                yield int(rows[pair.one]), int(rows[pair.other]), float(correlation)


def _joined(frames: Any, view: int) -> Any:
    """Unit vectors of whole videos. Shapes: (N x NUM_FRAMES, bytes) -> (N, NUM_FRAMES x dims)."""
    vectors = view_vectors(frames, view)
    return vectors.reshape(-1, NUM_FRAMES * vectors.shape[1]) / np.float32(np.sqrt(NUM_FRAMES))

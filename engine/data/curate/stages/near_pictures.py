"""Finds pictures that show the same: stored anew, resized, or cropped by a tenth of a side.

Vectors of the whole picture are compared with those of ten views of every other; what comes near
is laid over each other and measured (alignment.py). All three limits must hold. The defaults come
from copies made of Flickr8k, clothing and flower photos (benchmarks/results/prove_duplicates.json).
A copy whose colours were changed is none by the default of `max_colour`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.alignment import likeness
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.near_pairs import NearPair, near_pairs
from carillon.engine.data.curate.picture_signature import VIEWS, view_vectors
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)

_BATCH_PAIRS = 1024
_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class NearPictures(SetStage):
    """Keeps one of the pictures that show the same."""

    type: Literal["near_pictures"] = setting("near_pictures", "Kind of stage.")
    min_cosine: float = setting(
        0.8, "How near two vectors must come before the pictures are compared.", min=0.5, max=1
    )
    min_correlation: float = setting(
        0.93, "The least correlation of brightness once laid over each other.", min=0, max=1
    )
    max_patch: float = setting(
        28.0, "The greatest difference of one of 36 patches, in levels of 255.", min=0, max=255
    )
    max_colour: float = setting(
        8.0, "The greatest mean difference of colour, in levels of 255.", min=0, max=255
    )
    candidates: int = setting(16, "How many of the nearest pictures are compared.", min=1, max=256)

    score_names: ClassVar[tuple[str, ...]] = ("correlation",)

    def examine(self, item: Item) -> Finding | None:
        return Finding(signature=item.signature) if item.has("image") else None

    def decide(self, population: Population) -> Decisions:
        return keep_first(self.pairs(population), population)

    def pairs(self, population: Population) -> Iterator[tuple[int, int, float]]:
        """(row, row, correlation) of the pictures that show the same."""
        rows = population.rows()
        if not len(rows):
            return
        starts = range(0, len(rows), _BATCH_ROWS)
        vectors = np.concatenate(
            [view_vectors(population.matrix(rows[s : s + _BATCH_ROWS]), 0) for s in starts]
        )

        def views(block: slice) -> list[np.ndarray]:
            signatures = population.matrix(rows[block])
            return [view_vectors(signatures, view) for view in range(len(VIEWS))]

        near = near_pairs(vectors, views, min_cosine=self.min_cosine, most=self.candidates)
        while batch := list(islice(near, _BATCH_PAIRS)):
            yield from self._alike(population, rows, batch)

    def _alike(
        self, population: Population, rows: np.ndarray, batch: list[NearPair]
    ) -> Iterator[tuple[int, int, float]]:
        ones = rows[[pair.one for pair in batch]]
        others = rows[[pair.other for pair in batch]]
        views = [pair.view for pair in batch]
        found = likeness(population.matrix(ones), population.matrix(others), views)
        alike = (
            (found.correlation >= self.min_correlation)
            & (found.worst_patch <= self.max_patch)
            & (found.colour <= self.max_colour)
        )
        for at in np.flatnonzero(alike):
            yield int(ones[at]), int(others[at]), float(found.correlation[at])

"""Finds items whose captions are almost the same, by MinHash over words and pairs of words.

All captions of an item are one document. Its signature is 128 minima of hashes of its words and
pairs of neighbouring words, in scripts without spaces of its characters and pairs of these; the
share of equal minima estimates the Jaccard similarity within about 0.04. Documents that agree in
one of the bands are compared. Short documents (class names, "a photo of a rose") repeat without
being copies and are left alone: `min_words`.
Hashing is rensa's (MIT), twenty times faster than datasketch. Left out: paraphrases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)

NUM_HASHES, _BAND_ROWS = 128, 4
_MAX_BUCKET = 64
_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W_]+"
)


@dataclass(frozen=True, kw_only=True)
class NearTexts(SetStage):
    """Keeps one of the items whose captions are almost the same."""

    type: Literal["near_texts"] = setting("near_texts", "Kind of stage.")
    min_similarity: float = setting(
        0.6, "The least Jaccard similarity of words and pairs of words.", min=0.3, max=1
    )
    min_words: int = setting(12, "Items with fewer words than this are left alone.", min=1)
    languages: tuple[str, ...] = setting((), "Captions of these languages alone; all if empty.")

    score_names: ClassVar[tuple[str, ...]] = ("similarity",)

    def examine(self, item: Item) -> Finding | None:
        allowed = self.languages or tuple(item.captions)
        texts = [text for language, text in item.texts if language in allowed]
        words = [words_of(text) for text in texts]
        if sum(map(len, words)) < self.min_words:
            return None
        return Finding(signature=minima(words))

    def identity(self) -> dict[str, Any]:
        return {"rensa": version("rensa")}

    def decide(self, population: Population) -> Decisions:
        return keep_first(self.pairs(population), population)

    def pairs(self, population: Population) -> Iterator[tuple[int, int, float]]:
        """(row, row, similarity) of documents that are near."""
        rows = population.rows()
        if len(rows) < 2:
            return
        digests = population.matrix(rows).view("<u4")
        seen: set[tuple[int, int]] = set()
        for band in range(0, NUM_HASHES, _BAND_ROWS):
            for one, other in _equal_rows(digests[:, band : band + _BAND_ROWS]):
                if (one, other) in seen:
                    continue
                seen.add((one, other))
                similarity = float((digests[one] == digests[other]).mean())
                if similarity >= self.min_similarity:
                    yield int(rows[one]), int(rows[other]), similarity


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case; single characters in scripts without spaces."""
    return _WORD.findall(text.lower())


def minima(words: list[list[str]]) -> bytes:
    """The signature of a document of several texts, NUM_HASHES x 4 bytes."""
    from rensa import RMinHash

    tokens = {word for text in words for word in text}
    tokens |= {f"{a} {b}" for text in words for a, b in pairwise(text)}
    sketch = RMinHash(num_perm=NUM_HASHES, seed=0)
    sketch.update(sorted(tokens))
    return np.asarray(sketch.digest(), "<u4").tobytes()


def _equal_rows(band: Any) -> Iterator[tuple[int, int]]:
    """Pairs of rows that are equal in a band; of very many, each with the nearest before it."""
    packed = np.ascontiguousarray(band).view(f"V{band.shape[1] * 4}").ravel()
    _, places = np.unique(packed, return_inverse=True)
    order = np.argsort(places, kind="stable")
    sorted_places = places[order]
    starts = np.flatnonzero(np.diff(sorted_places, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        members = order[start:end].tolist()
        for at, other in enumerate(members):
            for one in members[max(0, at - _MAX_BUCKET) : at]:
                yield one, other

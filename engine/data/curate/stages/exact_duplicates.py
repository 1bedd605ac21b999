"""Finds items with the very same media bytes, by SHA-256; without media, the same captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)
from carillon.engine.data.items import media_sha256


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(SetStage):
    """Keeps one of the items with the same media bytes."""

    type: Literal["exact_duplicates"] = setting("exact_duplicates", "Kind of stage.")

    score_names: ClassVar[tuple[str, ...]] = ("same_bytes",)

    def examine(self, item: Item) -> Finding:
        if item.members:
            return Finding(signature=bytes.fromhex(media_sha256(item.members)))
        text = json.dumps(item.captions, sort_keys=True, ensure_ascii=False)
        return Finding(signature=hashlib.sha256(text.encode()).digest())

    def decide(self, population: Population) -> Decisions:
        return keep_first(self._pairs(population), population)

    def explain(self, score: float, match: str | None, *, is_evaluation: bool) -> str:
        return f"the same bytes as {'the evaluation item ' if is_evaluation else ''}{match}"

    def _pairs(self, population: Population) -> Iterator[tuple[int, int, float]]:
        """Each row with the one of its bytes that is kept."""
        best: dict[bytes, int] = {}
        rows = population.rows().tolist()
        digests = population.take(rows)
        for row, digest in zip(rows, digests, strict=True):
            standing = best.setdefault(digest, row)
            rank = (population.is_evaluation[row], population.quality[row], -row)
            if rank > (population.is_evaluation[standing], population.quality[standing], -standing):
                best[digest] = row
        for row, digest in zip(rows, digests, strict=True):
            if best[digest] != row:
                yield row, best[digest], 1.0

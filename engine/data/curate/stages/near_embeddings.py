"""Finds pictures that a dual encoder of ours takes for the same, by any run's checkpoint.

It finds what pixels do not show, such as two shots of one scene, as far as the model has learnt to;
`min_cosine` depends on the model, so look at the report's examples before dropping by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate import checkpoint_scorer
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.near_pairs import near_pairs
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)


@dataclass(frozen=True, kw_only=True)
class NearEmbeddings(SetStage):
    """Keeps one of the pictures that a checkpoint takes for the same."""

    type: Literal["near_embeddings"] = setting("near_embeddings", "Kind of stage.")
    run: str = setting(help="Folder of a dual encoder's run, or its name under runs/.")
    checkpoint: str = setting("latest", "latest, best or a step.")
    min_cosine: float = setting(0.95, "The least cosine of two pictures.", min=0, max=1)

    score_names: ClassVar[tuple[str, ...]] = ("cosine",)

    def check(self) -> Iterator[str]:
        yield from checkpoint_scorer.problems(self.run, self.checkpoint)

    def identity(self) -> dict[str, Any]:
        return {"checkpoint_hash": checkpoint_scorer.hash_of(self.run, self.checkpoint)}

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image"):
            return None
        vector = checkpoint_scorer.scorer_of(self.run, self.checkpoint).picture(item.picture)
        return Finding(signature=np.asarray(vector, "<f4").tobytes())

    def decide(self, population: Population) -> Decisions:
        rows = population.rows()
        if len(rows) < 2:
            return Decisions.none()
        vectors = population.matrix(rows).view("<f4")
        found = near_pairs(vectors, min_cosine=self.min_cosine)
        pairs = [(int(rows[pair.one]), int(rows[pair.other]), pair.cosine) for pair in found]
        return keep_first(pairs, population)

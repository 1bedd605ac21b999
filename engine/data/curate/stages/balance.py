"""Cuts groups down until their shares are those asked for.

An item's group is the language of most of its captions (the first by name among equals), or any
field of its JSON. The whole is made as large as the scarcest group allows, or as `tolerance` lets
the scarcest fall short; in each group the items with the lowest hash of (seed, key) stay, so adding
items moves few others. Groups without a share are `others`: kept whole, or dropped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Decisions, Finding, Population, SetStage


@dataclass(frozen=True, kw_only=True)
class Balance(SetStage):
    """Cuts groups down to target shares."""

    type: Literal["balance"] = setting("balance", "Kind of stage.")
    by: str = setting(
        "language", "`language`, or the field of an item's JSON that names its group."
    )
    shares: dict[str, float] = setting({}, "The share of each group; they add up to 1.")
    others: Literal["keep", "drop"] = setting("keep", "What happens to groups without a share.")
    tolerance: float = setting(
        0.0, "How far below its share, relatively, the scarcest group may stay.", min=0, max=1
    )

    score_names: ClassVar[tuple[str, ...]] = ("share",)

    def check(self) -> Iterator[str]:
        if not self.shares:
            yield "shares: none is given; write for example {en: 0.5, de: 0.5}"
        elif min(self.shares.values()) <= 0 or abs(sum(self.shares.values()) - 1) > 1e-6:
            yield f"shares: each is above 0 and all add up to 1, not {sum(self.shares.values()):g}"

    def examine(self, item: Item) -> Finding:
        return Finding(signature=self._group(item).encode("utf-8", "surrogatepass"))

    def decide(self, population: Population) -> Decisions:
        rows = population.rows()[~population.is_evaluation[population.rows()]].tolist()
        groups: dict[str, list[int]] = {}
        for row, name in zip(rows, population.take(rows), strict=True):
            groups.setdefault(name.decode("utf-8", "surrogatepass"), []).append(row)
        keep = self.targets({group: len(members) for group, members in groups.items()})
        gone: list[int] = []
        for group, members in groups.items():
            members.sort(key=lambda row: _place(population.seed, str(population.keys[row])))
            gone += members[keep[group] :]
        gone.sort()
        share = {row: self.shares.get(g, 0.0) for g, members in groups.items() for row in members}
        return Decisions(
            np.asarray(gone, np.int64),
            np.asarray([share[row] for row in gone], np.float32),
            np.full(len(gone), -1, np.int64),
        )

    def explain(self, score: float, match: str | None, *, is_evaluation: bool) -> str:
        if not score:
            return f"its {self.by} has no share"
        return f"more than the share of {score:g} by {self.by}"

    def targets(self, counts: dict[str, int]) -> dict[str, int]:
        """How many items of each group stay."""
        wholes = [counts.get(group, 0) / share for group, share in self.shares.items()]
        whole = min(wholes) / max(1e-9, 1 - self.tolerance) if self.tolerance < 1 else max(wholes)
        rest = {"keep": 1, "drop": 0}[self.others]
        return {
            group: min(count, int(whole * self.shares[group] + 1e-9))
            if group in self.shares
            else count * rest
            for group, count in counts.items()
        }

    def _group(self, item: Item) -> str:
        if self.by != "language":
            return str(item.meta.get(self.by, ""))
        counts = Counter({language: len(texts) for language, texts in item.captions.items()})
        return min(counts, key=lambda language: (-counts[language], language), default="")


def _place(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()

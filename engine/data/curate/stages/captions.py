"""Keeps captions of a usable length that do not repeat themselves.

A caption that does not pass leaves its item; an item without a caption left does not pass. With
`action: flag` or `annotate` every caption stays. Words are runs of letters and digits, and single
characters in scripts without spaces. Repetition is the share of words that stand in the caption
already ("sale sale sale" has 0.67).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.caption_findings import by_caption
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage
from carillon.engine.data.curate.stages.near_texts import words_of


@dataclass(frozen=True, kw_only=True)
class Captions(Stage):
    """Keeps captions of a usable length that do not repeat themselves."""

    type: Literal["captions"] = setting("captions", "Kind of stage.")
    min_words: int = setting(1, "The least words of a caption.", min=0)
    max_words: int = setting(256, "The greatest number of words of a caption.", min=1)
    max_repetition: float = setting(
        0.7, "The greatest share of words that the caption has already.", min=0, max=1
    )
    required: bool = setting(True, "Whether an item without any caption fails.")

    score_names: ClassVar[tuple[str, ...]] = ("words", "repetition")

    def limits(self) -> Mapping[str, Limits]:
        return {
            "words": (self.min_words, self.max_words),
            "repetition": (None, self.max_repetition),
        }

    def examine(self, item: Item) -> Finding | None:
        if not item.captions:
            return Finding(reason="it has no caption" if self.required else None)
        return by_caption(self, item, lambda language, text: measures(text))


def measures(text: str) -> dict[str, float]:
    """The number of words, and the share of them that are repetitions."""
    words = words_of(text)
    repeated = 1 - len(set(words)) / len(words) if words else 0.0
    return {"words": float(len(words)), "repetition": repeated}

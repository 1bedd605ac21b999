"""Keeps captions that are not offensive, by alt-profanity-check's model (English) and word lists.

The model is a linear one over words, trained on comments, whose weights ship in the package. A
caption of another language is judged by `words` alone. A caption that fails leaves its item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.caption_findings import by_caption
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage
from carillon.engine.data.curate.stages.near_texts import words_of
from carillon.engine.data.samples import UNKNOWN_LANGUAGE


@dataclass(frozen=True, kw_only=True)
class Toxicity(Stage):
    """Keeps captions that are not offensive."""

    type: Literal["toxicity"] = setting("toxicity", "Kind of stage.")
    max_score: float = setting(0.8, "The greatest score, from 0 to 1.", min=0, max=1)
    words: tuple[str, ...] = setting((), "Further words, of any language, that score 1.")

    score_names: ClassVar[tuple[str, ...]] = ("toxicity",)
    packages: ClassVar[tuple[str, ...]] = ("profanity_check",)

    def limits(self) -> Mapping[str, Limits]:
        return {"toxicity": (None, self.max_score)}

    def identity(self) -> dict[str, Any]:
        return {"alt-profanity-check": version("alt-profanity-check")}

    def examine(self, item: Item) -> Finding | None:
        return by_caption(self, item, self._score) if item.captions else None

    def _score(self, language: str, text: str) -> dict[str, float]:
        if _listed(self.words) & set(words_of(text)):
            return {"toxicity": 1.0}
        if language.partition("-")[0] not in ("en", UNKNOWN_LANGUAGE):
            return {"toxicity": 0.0}
        return {"toxicity": round(float(_model()([text])[0]), 6)}


@cache
def _listed(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word.lower() for word in words)


@cache
def _model() -> Any:
    from profanity_check import predict_prob

    return predict_prob

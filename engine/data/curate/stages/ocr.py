"""Reads the text in pictures and sends those that are mostly text where they belong.

RapidOCR (Apache-2.0; PP-OCR's models, 33 MB, in the package) finds and reads lines. What it reads
goes into the item's JSON as `ocr` {text, lines, area}; the score is the share of the picture that
its lines cover. With `split`, pictures above `max_area` go to that split and pass; else they fail.
It costs a few tenths of a second a picture, so it stands best at the end of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage, reason_by

_MAX_TEXT_CHARS = 8192


@dataclass(frozen=True, kw_only=True)
class Ocr(Stage):
    """Reads text in pictures; those that are mostly text are dropped, flagged or routed."""

    type: Literal["ocr"] = setting("ocr", "Kind of stage.")
    max_area: float = setting(
        0.2, "The greatest share of the picture that text may cover.", min=0, max=1
    )
    min_confidence: float = setting(0.5, "Lines read less surely are left out.", min=0, max=1)
    split: str | None = setting(None, "Split for pictures above `max_area`, such as documents.")

    score_names: ClassVar[tuple[str, ...]] = ("text_area",)
    packages: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime")

    def limits(self) -> Mapping[str, Limits]:
        return {"text_area": (None, self.max_area)}

    def identity(self) -> dict[str, Any]:
        return {"rapidocr": version("rapidocr")}

    def check(self) -> Iterator[str]:
        if self.split is not None and not self.split.isidentifier():
            yield f"split: {self.split!r} must be letters, digits and underscores"

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image"):
            return None
        lines, area = read_text(item.picture, self.min_confidence)
        scores = {"text_area": round(area, 6)}
        text = "\n".join(lines)[:_MAX_TEXT_CHARS]
        meta = {"ocr": {"text": text, "lines": len(lines), **scores}} if lines else {}
        reason = reason_by(self.limits(), scores)
        if reason is not None and self.split is not None:
            return Finding(scores=scores, meta=meta, split=self.split)
        return Finding(scores=scores, meta=meta, reason=reason)


def read_text(pixels: Any, min_confidence: float) -> tuple[list[str], float]:
    """The lines in a picture from top to bottom, and the share of it that they cover."""
    found = _engine()(np.ascontiguousarray(pixels[:, :, ::-1]))  # it takes BGR
    if found.boxes is None or found.txts is None:
        return [], 0.0
    kept = [
        (box, text)
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        if score >= min_confidence and text.strip()
    ]
    area = sum(_area(np.asarray(box, np.float64)) for box, _ in kept)
    return [text for _, text in kept], min(1.0, area / (pixels.shape[0] * pixels.shape[1]))


def _area(corners: Any) -> float:
    """The area of a quadrangle by the shoelace formula."""
    x, y = corners[:, 0], corners[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


@cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    return RapidOCR(params={threads: 1, "Global.log_level": "error"})

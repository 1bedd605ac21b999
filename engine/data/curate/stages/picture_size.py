"""Keeps pictures that are large enough and not too long and thin, by their headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage, reason_by


@dataclass(frozen=True, kw_only=True)
class PictureSize(Stage):
    """Keeps pictures of a usable size and shape."""

    type: Literal["picture_size"] = setting("picture_size", "Kind of stage.")
    min_side: int = setting(64, "The least pixels of the shorter side.", min=1)
    max_aspect: float = setting(4.0, "The greatest longer side over the shorter.", min=1)

    score_names: ClassVar[tuple[str, ...]] = ("shorter_side", "aspect")

    def limits(self) -> Mapping[str, Limits]:
        return {"shorter_side": (self.min_side, None), "aspect": (None, self.max_aspect)}

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image"):
            return None
        shorter, longer = sorted(item.picture_size)
        scores = {"shorter_side": float(shorter), "aspect": longer / shorter}
        return Finding(scores=scores, reason=reason_by(self.limits(), scores))

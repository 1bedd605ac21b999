"""Keeps pictures that are sharp and show something.

Sharpness is the standard deviation of the Laplacian of brightness, of the picture at most 256
pixels long, so that it does not depend on the camera. Contrast is the standard deviation of
brightness: near zero for a picture of one colour. Drawings in flat colours are sharp by this
measure; photographs of fog are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage, reason_by


@dataclass(frozen=True, kw_only=True)
class Blur(Stage):
    """Keeps pictures that are sharp and have some contrast."""

    type: Literal["blur"] = setting("blur", "Kind of stage.")
    min_sharpness: float = setting(4.0, "The least sharpness, in levels of 255.", min=0)
    min_contrast: float = setting(4.0, "The least contrast, in levels of 255.", min=0)

    score_names: ClassVar[tuple[str, ...]] = ("sharpness", "contrast")

    def limits(self) -> Mapping[str, Limits]:
        return {"sharpness": (self.min_sharpness, None), "contrast": (self.min_contrast, None)}

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image"):
            return None
        grey = item.grey.astype(np.float32)
        scores = {"sharpness": sharpness(grey), "contrast": float(grey.std())}
        return Finding(scores=scores, reason=reason_by(self.limits(), scores))


def sharpness(grey: Any) -> float:
    """The standard deviation of the Laplacian; 0 of a picture below three pixels a side."""
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * middle).std())

"""Keeps captions that a dual encoder of ours finds fitting: CLIP score, by any run's checkpoint.

The score is the cosine of picture and caption. Its scale depends on the model, and on the language
as far as the model has seen it: look at the report's histogram before dropping by it. A caption
that fails leaves its item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate import checkpoint_scorer
from carillon.engine.data.curate.caption_findings import by_caption
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage


@dataclass(frozen=True, kw_only=True)
class CaptionMatch(Stage):
    """Keeps captions that fit their picture by a checkpoint."""

    type: Literal["caption_match"] = setting("caption_match", "Kind of stage.")
    run: str = setting(help="Folder of a dual encoder's run, or its name under runs/.")
    checkpoint: str = setting("latest", "latest, best or a step.")
    min_cosine: float = setting(0.2, "The least cosine of picture and caption.", min=-1, max=1)

    score_names: ClassVar[tuple[str, ...]] = ("cosine",)

    def limits(self) -> Mapping[str, Limits]:
        return {"cosine": (self.min_cosine, None)}

    def check(self) -> Iterator[str]:
        yield from checkpoint_scorer.problems(self.run, self.checkpoint)

    def identity(self) -> dict[str, Any]:
        return {"checkpoint_hash": checkpoint_scorer.hash_of(self.run, self.checkpoint)}

    def examine(self, item: Item) -> Finding | None:
        if not item.has("image") or not item.captions:
            return None
        scorer = checkpoint_scorer.scorer_of(self.run, self.checkpoint)
        picture = scorer.picture(item.picture)

        def measure(language: str, text: str) -> dict[str, float]:
            return {"cosine": round(float(picture @ scorer.text(text)), 6)}

        return by_caption(self, item, measure)

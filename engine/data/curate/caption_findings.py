"""Stages that judge captions one by one: what that means for their item, once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Stage, reason_by


def by_caption(
    stage: Stage, item: Item, measure: Callable[[str, str], Mapping[str, float]]
) -> Finding:
    """Score every caption; the item's scores are those of the caption that does worst.

    With `action: drop`, captions that fail leave and the item fails when none is left; else the
    item fails with its first caption that does.
    """
    limits = stage.limits()
    left: dict[str, list[str]] = {}
    worst: Mapping[str, float] = {}
    first_reason: str | None = None
    for language, text in item.texts:
        scores = measure(language, text)
        reason = reason_by(limits, scores)
        if reason is None:
            left.setdefault(language, []).append(text)
        if not worst or (reason is not None and first_reason is None):
            worst = scores
        first_reason = first_reason or reason
    if first_reason is None:
        return Finding(scores=worst)
    if stage.action != "drop":
        return Finding(scores=worst, reason=first_reason)
    if left:
        return Finding(scores=worst, captions=left)
    return Finding(scores=worst, reason=f"no caption passes: {first_reason}")

"""Checks the transcripts of sounds and videos, which ingestion reads from subtitles and sidecars.

Segments must lie in order within the sound; the letters read a second tell a transcript that
belongs elsewhere, or a subtitle file that is cut short. Speech has 3 to 30 letters a second in most
languages. Left out: recognising speech.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Limits, Stage, reason_by
from carillon.engine.data.samples import main_member

_SLACK_S = 1.0  # subtitles may stay on a little longer than the sound


@dataclass(frozen=True, kw_only=True)
class Transcripts(Stage):
    """Keeps sounds and videos whose transcripts can be theirs."""

    type: Literal["transcripts"] = setting("transcripts", "Kind of stage.")
    required: bool = setting(False, "Whether a sound or video without a transcript fails.")
    min_letters_per_s: float = setting(0.2, "The least letters a second of sound.", min=0)
    max_letters_per_s: float = setting(40.0, "The most letters a second of sound.", min=0)

    score_names: ClassVar[tuple[str, ...]] = ("letters_per_s", "covered")

    def limits(self) -> Mapping[str, Limits]:
        return {"letters_per_s": (self.min_letters_per_s, self.max_letters_per_s)}

    def examine(self, item: Item) -> Finding | None:
        if not (item.has("audio") or item.has("video")):
            return None
        transcripts = item.meta.get("transcripts") or {}
        if not transcripts:
            return Finding(reason="it has no transcript" if self.required else None)
        duration_s = _duration_s(item)
        segments = item.meta.get("segments") or []
        problem = _segments_problem(segments, duration_s)
        scores: dict[str, float] = {}
        if duration_s:
            letters = [sum(map(len, texts)) for texts in transcripts.values()]
            scores["letters_per_s"] = max(letters) / duration_s
            scores["covered"] = _covered_s(segments) / duration_s if not problem else 0.0
        return Finding(scores=scores, reason=problem or reason_by(self.limits(), scores))


def _duration_s(item: Item) -> float | None:
    facts = item.meta.get("media") or {}
    for modality in ("audio", "video"):
        name = main_member(item.members, modality)
        of_member = facts.get(name) if isinstance(facts, Mapping) and name else None
        if isinstance(of_member, Mapping):
            value = of_member.get("duration_s")
            if isinstance(value, (int, float)) and value > 0:
                return float(value)
    return None


def _segments_problem(segments: Any, duration_s: float | None) -> str | None:
    last = 0.0
    for number, segment in enumerate(segments if isinstance(segments, list) else [None]):
        try:
            start_s, end_s = float(segment["start_s"]), float(segment["end_s"])
        except (TypeError, KeyError, ValueError):
            return f"segment {number} has no start_s and end_s"
        if not 0 <= start_s <= end_s or start_s < last:
            return f"segment {number} ({start_s:g} to {end_s:g} s) is out of order"
        if duration_s is not None and end_s > duration_s + _SLACK_S:
            return f"segment {number} ends at {end_s:g} s of {duration_s:g} s"
        last = start_s
    return None


def _covered_s(segments: Any) -> float:
    """Seconds that segments cover, where they overlap once."""
    covered, reached = 0.0, 0.0
    for segment in segments:
        start_s, end_s = float(segment["start_s"]), float(segment["end_s"])
        covered += max(0.0, end_s - max(start_s, reached))
        reached = max(reached, end_s)
    return covered

"""Finds sounds that are the same recording: stored anew, louder, or cut at the ends.

Unlike recordings differ in half of their bits; the default limit stands far below what chance
gives, and above what lossy codecs change. The first two minutes count. Left out: other speeds and
pitches, and sounds shorter than a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.sound_fingerprint import RATE, fingerprint, near_sounds
from carillon.engine.data.curate.stage import (
    Decisions,
    Finding,
    Population,
    SetStage,
    keep_first,
)
from carillon.engine.data.decode.audio import decode_audio

_MAX_S = 120.0


@dataclass(frozen=True, kw_only=True)
class NearSounds(SetStage):
    """Keeps one of the sounds that are the same recording."""

    type: Literal["near_sounds"] = setting("near_sounds", "Kind of stage.")
    max_bit_errors: float = setting(
        0.3, "The greatest share of a fingerprint's bits that differ.", min=0, max=0.45
    )

    score_names: ClassVar[tuple[str, ...]] = ("bit_errors",)

    def examine(self, item: Item) -> Finding | None:
        if not item.has("audio"):
            return None
        data = item.medium("audio")
        sound = decode_audio(data, rate=RATE, mono=True, duration_s=_MAX_S)
        return Finding(signature=fingerprint(sound.samples[0]))

    def decide(self, population: Population) -> Decisions:
        return keep_first(self._pairs(population), population)

    def _pairs(self, population: Population) -> Iterator[tuple[int, int, float]]:
        rows = population.rows()
        found = near_sounds(population.take(rows), max_bit_errors=self.max_bit_errors)
        for pair in found:
            yield int(rows[pair.one]), int(rows[pair.other]), pair.bit_errors

"""Finds personal data in captions, transcripts and segments, and puts stand-ins in its place.

With `replace`, an address becomes `[email]`, or with `key_file` `[email-3f9a2c71d04b]`: the first
digits of an HMAC under that key, so equal values stay equal and nobody without the key can try
values out. What is found is never written to a report, a reason or a log. `score` counts finds.
An item in which something was replaced passes; without `replace` it fails.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from carillon.engine.access import explained
from carillon.engine.config import UserError, setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.personal_data import (
    KINDS,
    find_personal_data,
    replace_personal_data,
)
from carillon.engine.data.curate.stage import Finding, Stage

_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Pii(Stage):
    """Replaces personal data in texts, or drops or flags the items that have some."""

    type: Literal["pii"] = setting("pii", "Kind of stage.")
    kinds: tuple[str, ...] = setting(KINDS, "What to look for.", choices=KINDS)
    regions: tuple[str, ...] = setting(
        ("US", "GB", "DE", "FR", "ES"),
        "Countries whose phone numbers count without a country code.",
    )
    replace: bool = setting(True, "Whether finds are replaced; else the item fails.")
    key_file: str | None = setting(
        None, "File with a secret of 16 bytes or more, under which equal values stay equal."
    )

    score_names: ClassVar[tuple[str, ...]] = ("finds",)
    packages: ClassVar[tuple[str, ...]] = ("phonenumbers",)

    def check(self) -> Iterator[str]:
        try:
            if self.key_file is not None and len(Path(self.key_file).read_bytes().strip()) < 16:
                yield f"key_file: {self.key_file} holds fewer than 16 bytes"
        except OSError as error:
            yield f"key_file: {self.key_file}: {explained(error)}"
        if self.missing() is None:
            from phonenumbers import SUPPORTED_REGIONS

            unknown = sorted(set(self.regions) - set(SUPPORTED_REGIONS))
            if unknown:
                yield f"regions: {unknown[0]!r} is no country of two letters, such as DE"

    def identity(self) -> dict[str, Any]:
        told = {"phonenumbers": version("phonenumbers")}
        if self.key_file is not None:
            told["key"] = self._stand_in("key", "carillon")
        return told

    def examine(self, item: Item) -> Finding:
        counts: Counter[str] = Counter()
        captions = {
            language: [self._clean(text, counts) for text in texts]
            for language, texts in item.captions.items()
        }
        meta: dict[str, Any] = {}
        if transcripts := item.meta.get("transcripts"):
            meta["transcripts"] = {
                language: [self._clean(text, counts) for text in texts]
                for language, texts in transcripts.items()
            }
        if isinstance(segments := item.meta.get("segments"), list):
            meta["segments"] = [self._clean_segment(one, counts) for one in segments]
        scores = {"finds": float(sum(counts.values()))}
        if not counts:
            return Finding(scores=scores)
        if self.replace:
            return Finding(scores=scores, captions=captions, meta=meta)
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        return Finding(scores=scores, reason=f"personal data: {listed}")

    def cleaned(self, text: str) -> str:
        """A text with its personal data replaced."""
        return self._clean(text, Counter())

    def _clean(self, text: str, counts: Counter[str]) -> str:
        finds = find_personal_data(text, self.kinds, self.regions)
        counts.update(found.kind for found in finds)
        return replace_personal_data(text, finds, self._stand_in) if finds else text

    def _clean_segment(self, segment: Any, counts: Counter[str]) -> Any:
        if not isinstance(segment, Mapping) or not isinstance(segment.get("text"), str):
            return segment
        return {**segment, "text": self._clean(segment["text"], counts)}

    def _stand_in(self, kind: str, inside: str) -> str:
        if self.key_file is None:
            return f"[{kind}]"
        plain = "".join(inside.lower().split()).replace("-", "") if kind != "email" else inside
        digest = hmac.new(_key(self.key_file), f"{kind} {plain}".encode(), hashlib.sha256)
        return f"[{kind}-{digest.hexdigest()[:_DIGITS]}]"


@cache
def _key(path: str) -> bytes:
    try:
        return Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"key_file {path}: {explained(error)}") from None

"""Keeps items under licences that are allowed.

Names are compared as SPDX identifiers without regard to case. In `allow`, `*` stands for anything
without a hyphen: `CC-BY-*` allows CC-BY-4.0 and not CC-BY-NC-4.0; alone it allows all. In `deny` it
stands for anything: `*-NC-*` denies all these. A list such as `MIT OR GPL-2.0-only` passes if one
of it is allowed, `A AND B` if all are. Left out: reading licences from texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from carillon.engine.config import setting
from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, Stage


@dataclass(frozen=True, kw_only=True)
class Licence(Stage):
    """Keeps items whose licence is allowed."""

    type: Literal["licence"] = setting("licence", "Kind of stage.")
    allow: tuple[str, ...] = setting(
        ("*",), "SPDX names that may stay; in CC-BY-* the * stands for a part without hyphens."
    )
    deny: tuple[str, ...] = setting(
        (), "SPDX names that may not stay, as *-NC-*, whatever `allow` says."
    )
    unstated: Literal["allow", "deny"] = setting(
        "deny", "Whether items without a licence may stay."
    )

    def examine(self, item: Item) -> Finding:
        licence = str(item.meta.get("licence") or "").strip()
        if not licence:
            stated = None if self.unstated == "allow" else "no licence is stated"
            return Finding(reason=stated)
        return Finding(reason=None if self._passes(licence) else f"licence {licence[:80]}")

    def check(self) -> Iterator[str]:
        if not self.allow:
            yield 'allow: the list is empty; name licences, or "*" for all'

    def _passes(self, licence: str) -> bool:
        choices = re.split(r"\s+OR\s+", licence.strip("() "))
        return any(all(map(self._allowed, re.split(r"\s+AND\s+", one))) for one in choices)

    def _allowed(self, name: str) -> bool:
        lowered = name.strip("() ").lower()
        if any(fnmatchcase(lowered, pattern.lower()) for pattern in self.deny):
            return False
        return any(_matches(lowered, pattern.lower()) for pattern in self.allow)


def _matches(name: str, pattern: str) -> bool:
    """Whether part by part between hyphens; what `*` lets in must not be another licence."""
    if pattern == "*":
        return True
    parts, patterns = name.split("-"), pattern.split("-")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))

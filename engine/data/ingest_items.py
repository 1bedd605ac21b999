"""What the sources of an ingest yield: items, which say where their bytes are, and what is refused.

An item is small whatever its media are, so that thousands can wait their turn. Media and the texts
beside them are read by whoever loads the item; a table has its texts in the row already.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from carillon.engine.data.samples import UNKNOWN_LANGUAGE

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"),
    "audio": (".flac", ".wav", ".mp3", ".ogg", ".opus"),
    "video": (".mp4", ".webm"),
}
MEDIA_SUFFIXES = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
TEXT_SUFFIXES = (".json", ".txt", ".srt", ".vtt")
_KEY_CHARACTERS = re.compile(r"[^\w-]+")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8})*")


class LocalFile(NamedTuple):
    """A file that was found to be allowed."""

    path: Path


class Url(NamedTuple):
    """An http or https URL, which nobody vouches for."""

    url: str


class Span(NamedTuple):
    """Bytes of a file by path or URL that the user named; a size of none: the whole file."""

    place: str
    offset: int = 0
    size: int | None = None


class Inline(NamedTuple):
    """Bytes that stood in the source itself."""

    data: bytes


Where = LocalFile | Url | Span | Inline


class Text(NamedTuple):
    """A file of text beside an item's media: `suffix` says how it is read."""

    suffix: str
    language: str | None
    where: Where


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns as the user gave them; None or empty means: find them."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    transcripts: tuple[str, ...] = ()
    language: str | None = None
    default_language: str = UNKNOWN_LANGUAGE


@dataclass(kw_only=True)
class Item:
    """One sample to be: where its media and texts are, and what its source says of it.

    `name` is shown and stored; `ref` tells it from the others of its source. `members` are by
    label, empty for the main one, and a suffix where one is stated: `frames.jpg`, `jpg`, ``.
    """

    source: str
    name: str
    members: dict[str, Where]
    ref: str | None = None
    texts: list[Text] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=dict)
    transcripts: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    may_be_silent: bool = False  # taken without any text

    @property
    def key(self) -> str:
        """From source and reference alone: readable, unique by its hash."""
        origin = f"{self.source}/{self.ref or self.name}"
        stem = _KEY_CHARACTERS.sub("-", self.name.rpartition(".")[0] or self.name).strip("-")
        digest = hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()
        return f"{stem[-40:]}-{digest[:16]}".lstrip("-")

    @property
    def origin(self) -> str:
        """Where it came from: its URL, or its source and name."""
        main = next(iter(self.members.values()), None)
        return main.url if isinstance(main, Url) else f"{self.source}/{self.name}"

    @cached_property
    def identity(self) -> str:
        """What a source that did not change yields again at the same place.

        To be asked for before the item is loaded, which adds the texts beside its media.
        """
        return _digest(
            [self.source, self.name, self.ref, self.captions, self.transcripts, self.extra]
        )

    @property
    def inline_bytes(self) -> int:
        """How much memory its bytes take while it waits."""
        wheres = self.members.values()
        return sum(len(where.data) for where in wheres if isinstance(where, Inline))


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What could not be taken, and why."""

    source: str
    image: str
    reason: str

    @cached_property
    def identity(self) -> str:
        return _digest([self.source, self.image, self.reason])


Entry = Item | Rejected


def _digest(told: list[Any]) -> str:
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def check_language(code: object) -> None:
    """Raise ValueError unless `code` has the shape of a BCP 47 tag."""
    if not isinstance(code, str) or not _LANGUAGE.fullmatch(code):
        raise ValueError(f"{code!r} is no language code like en, pt-BR or zh-Hant")


def merge_texts(into: dict[str, list[str]], texts: Mapping[str, list[str]]) -> None:
    """Add texts by language, each once."""
    for language, listed in texts.items():
        held = into.setdefault(language, [])
        held += [text for text in listed if text not in held]


def siblings(names: list[str]) -> Iterator[tuple[str, list[tuple[str, str | None, str]]]]:
    """The media among a folder's names, in order, each with the texts beside it.

    A text has the medium's stem, for subtitles and transcripts with a language between:
    `talk.mp4`, `talk.json`, `talk.en.vtt`. It comes as (suffix, language, name).
    """
    texts: dict[str, list[tuple[str, str | None, str]]] = {}
    for name in sorted(names):
        stem, dot, suffix = name.rpartition(".")
        suffix = f".{suffix.lower()}"
        if not dot or suffix not in TEXT_SUFFIXES:
            continue
        texts.setdefault(stem, []).append((suffix, None, name))
        parent, _, language = stem.rpartition(".")
        if parent and _LANGUAGE.fullmatch(language) and suffix != ".json":
            texts.setdefault(parent, []).append((suffix, language.replace("_", "-"), name))
    for name in sorted(names):
        stem, dot, suffix = name.rpartition(".")
        if dot and f".{suffix.lower()}" in MEDIA_SUFFIXES:
            yield name, sorted(texts.get(stem, []), key=lambda text: text[0])

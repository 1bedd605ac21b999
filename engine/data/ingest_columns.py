"""Which columns of a table say what: media, captions, transcripts, language.

Columns are found by their usual names, in any case, or named by the user; `caption_de` is a German
caption. Other columns are kept when they are plain values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from carillon.engine.config import UserError
from carillon.engine.data.ingest_items import Columns, check_language
from carillon.engine.data.ingest_tables import Row

_MEDIA_NAMES = (
    *("image", "image_path", "path", "file", "file_name", "filename", "filepath", "picture"),
    *("img", "img_path", "image_file", "url", "image_url", "img_url", "audio", "audio_path"),
    *("audio_url", "video", "video_path", "video_url", "link"),
)
_CAPTION_NAMES = ("captions", "caption", "text", "sentence", "description", "title", "alt")
_TRANSCRIPT_NAMES = ("transcripts", "transcript", "transcription")
_LANGUAGE_NAMES = ("language", "lang", "locale")
_WITH_LANGUAGE = re.compile(
    r"(captions?|text|transcripts?)[_.:-]([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})?)", re.IGNORECASE
)
_RESERVED = ("captions", "transcripts", "segments", "source", "keywords", "media")


class Found(NamedTuple):
    """The columns in use; captions and transcripts with the language that each implies."""

    media: str
    captions: dict[str, str | None]
    transcripts: dict[str, str | None]
    language: str | None

    @property
    def names(self) -> set[str]:
        known = {self.media, *self.captions, *self.transcripts}
        return known | ({self.language} if self.language else set())


def find_columns(place: str, names: Sequence[str], columns: Columns) -> Found:
    """What the columns are. Raises UserError for a named one that is not there, or none known."""
    given = [columns.image, columns.language]
    given += [name.rpartition("=")[2] for name in (*columns.captions, *columns.transcripts)]
    for name in given:
        if name is not None and name not in names:
            raise UserError(f"{place} has no column {name!r}; it has {', '.join(names) or 'none'}")
    media = columns.image or _first(_MEDIA_NAMES, names)
    found = text_columns(media or "", [name for name in names if name != media], columns)
    if media is None or not (found.captions or found.transcripts):
        raise _unknown(place, names, lacks_media=media is None)
    return found


def text_columns(media: str, names: Sequence[str], columns: Columns) -> Found:
    """The columns of text among `names`: those that the user named, or the usual ones."""
    captions, transcripts = _named(columns.captions), _named(columns.transcripts)
    if not captions and not transcripts:
        captions, transcripts = _usual(names)
    return Found(media, captions, transcripts, columns.language or _first(_LANGUAGE_NAMES, names))


def _named(given: Iterable[str]) -> dict[str, str | None]:
    split = (name.rpartition("=") for name in given)
    return {name: (stated if equals else None) for stated, equals, name in split}


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in known if name in by_lower), None)


def _usual(names: Sequence[str]) -> tuple[dict[str, str | None], dict[str, str | None]]:
    captions: dict[str, str | None] = {}
    transcripts: dict[str, str | None] = {}
    for name in names:
        if match := _WITH_LANGUAGE.fullmatch(name):
            held = transcripts if match[1].lower().startswith("transcript") else captions
            held[name] = match[2].replace("_", "-")
    for known, held in ((_CAPTION_NAMES, captions), (_TRANSCRIPT_NAMES, transcripts)):
        plain = _first(known, names)
        if plain is not None:
            held[plain] = None
    return captions, transcripts


def _unknown(place: str, names: Sequence[str], *, lacks_media: bool) -> UserError:
    lacking = "--image-column" if lacks_media else "--caption-column"
    return UserError(
        f"{place} has the columns {', '.join(names) or 'none'}: none of them is known as a "
        f"{'picture path' if lacks_media else 'caption'}. Name it with {lacking}."
    )


def texts_of(row: Row, columns: Mapping[str, str | None], language: str) -> dict[str, list[str]]:
    """Texts by language of one row. Raises ValueError for what is no text."""
    found: dict[str, list[str]] = {}
    for column, own_language in columns.items():
        value = row.get(column)
        if value is None or value == "":
            continue
        by_language = value if isinstance(value, dict) else {own_language or language: value}
        for code, texts in by_language.items():
            if texts is None:
                continue
            check_language(code)
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the column {column!r} holds no text")
            found.setdefault(code, []).extend(texts)
    return found


def plain_values(row: Row, known: Iterable[str]) -> dict[str, Any]:
    """The other columns, as far as JSON holds them unchanged."""
    reserved = {*known, *_RESERVED}
    kept: dict[str, Any] = {}
    for name, value in row.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if name not in reserved and isinstance(value, (str, int, float)) and finite and value != "":
            kept["licence" if name == "license" else name] = value
    return kept

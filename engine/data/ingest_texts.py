"""Texts beside media: captions, transcripts and subtitles into what a sample's JSON holds.

`.json` is a sample's JSON (captions, transcripts, any key), or what a speech recogniser wrote
(text, segments with start and end, language). `.txt` has a caption a line beside a picture, a line
of the transcript beside sound and video. `.srt` and `.vtt` become segments with times, and the
transcript of their language. A cue whose times cannot be read, or that ends before it starts, is
left out and counted in `segments_skipped`; a file with none left is refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

from carillon.engine.data.ingest_items import Item, merge_texts
from carillon.engine.data.samples import UNKNOWN_LANGUAGE, clean_caption, parse_meta

MAX_TEXT_BYTES = 16 << 20
_MAX_SEGMENTS = 100_000
_TIME = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_STYLE = re.compile(r"\{\\[^{}]*\}")  # of ASS, which some .srt files carry


def add_text(item: Item, suffix: str, language: str | None, data: bytes, default: str) -> None:
    """Put a text file's content into the item. Raises ValueError with the reason."""
    heard = _is_heard(item)
    if suffix == ".json":
        _add_json(item, data, default, heard)
    elif suffix == ".txt":
        if heard or not (item.captions and language is None):  # a JSON's captions go before
            lines = _decoded(data).splitlines()
            merge_texts(item.transcripts if heard else item.captions, {language or default: lines})
    else:
        _add_segments(item, _cues(_decoded(data)), language or default)


def _is_heard(item: Item) -> bool:
    """Whether the item is sound or video by its members' names."""
    return any(
        f".{name.rpartition('.')[2]}" in (".flac", ".wav", ".mp3", ".ogg", ".opus", ".mp4", ".webm")
        for name in item.members
    )


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _add_json(item: Item, data: bytes, default: str, heard: bool) -> None:
    meta = parse_meta(data)
    language = meta.pop("language", None) if heard else meta.get("language")
    language = language if isinstance(language, str) and language else default
    for field, held in (("captions", item.captions), ("transcripts", item.transcripts)):
        texts = meta.pop(field, {})
        merge_texts(
            held, {default if code == UNKNOWN_LANGUAGE else code: t for code, t in texts.items()}
        )
    segments = meta.get("segments")
    if isinstance(segments, list) and segments and _are_recognised(segments):
        del meta["segments"]
        _add_segments(item, [_recognised(one) for one in segments], language)
    if heard and isinstance(meta.get("text"), str) and not item.transcripts:
        item.transcripts[language] = meta.pop("text").splitlines()
    item.extra |= {"licence" if name == "license" else name: v for name, v in meta.items()}


def _are_recognised(segments: list[Any]) -> bool:
    return all(isinstance(one, dict) and "start" in one and "text" in one for one in segments)


def _recognised(segment: dict[str, Any]) -> tuple[float, float, str] | None:
    start, end, text = segment.get("start"), segment.get("end"), segment.get("text")
    if not isinstance(start, (int, float)) or not isinstance(end, (int, float)):
        return None
    return (float(start), float(end), str(text)) if math.isfinite(start + end) else None


def _cues(text: str) -> list[tuple[float, float, str] | None]:
    """Start, end and text of each cue of an .srt or .vtt file; None for one with odd times."""
    cues: list[tuple[float, float, str] | None] = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip("\n").split("\n")
        at = next((number for number, line in enumerate(lines[:2]) if "-->" in line), None)
        if at is None:
            continue  # a header, a note, a style
        match = _CUE.fullmatch(lines[at])
        said = " ".join(lines[at + 1 :])
        cues.append((_seconds(match, 1), _seconds(match, 5), said) if match else None)
    return cues


def _seconds(match: re.Match[str], first: int) -> float:
    hours, minutes, seconds, fraction = match.group(first, first + 1, first + 2, first + 3)
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return round(whole + int(fraction) / 10.0 ** len(fraction), 3)


def _add_segments(item: Item, cues: list[tuple[float, float, str] | None], language: str) -> None:
    if len(cues) > _MAX_SEGMENTS:
        raise ValueError(f"{len(cues):,} segments; at most {_MAX_SEGMENTS:,} are allowed")
    segments: list[dict[str, Any]] = item.extra.setdefault("segments", [])
    lines: list[str] = []
    skipped = 0
    for cue in cues:
        if cue is None or not 0 <= cue[0] <= cue[1]:
            skipped += 1
        elif said := clean_caption(_STYLE.sub("", cue[2])):
            lines.append(said)
            segments.append(
                {"start_s": cue[0], "end_s": cue[1], "text": said, "language": language}
            )
    if not lines:
        raise ValueError("its subtitles hold no text with times that can be read")
    if skipped:
        item.extra["segments_skipped"] = skipped + item.extra.get("segments_skipped", 0)
    item.transcripts.setdefault(language, []).extend(lines)


def has_text(item: Item) -> bool:
    """Whether anything is left to learn from beside the media."""
    return any(
        text.strip()
        for held in (item.captions, item.transcripts)
        for t in held.values()
        for text in t
    )

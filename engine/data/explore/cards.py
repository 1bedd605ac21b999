"""A sample as it is shown: its panels and what is said of it, whichever page it goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from carillon.engine.data.explore.panels import Panel, panels_of
from carillon.engine.data.samples import SampleError
from carillon.engine.data.shards import Dataset

SHOWN_FIELDS = ("licence", "licence_source", "source", "author")
MAX_TEXT = 400


class Said(NamedTuple):
    """A text of a sample in a language; `kind` is captions, transcripts or segments."""

    kind: str
    language: str
    text: str


class Card(NamedTuple):
    """A sample; one that cannot be read has the reason as `error`."""

    split: str
    row: int
    key: str
    panels: Sequence[Panel]
    texts: Sequence[Said]
    fields: Sequence[tuple[str, str]]
    error: str | None = None


def card_of(dataset: Dataset, split: str, row: int, languages: Collection[str]) -> Card:
    """Read a sample and draw it; of its texts those in `languages`, or all where none is named."""
    try:
        sample = dataset.splits[split].read(row)
    except SampleError as error:
        return Card(split, row, error.key, (), (), (), error.reason)
    texts = [one for one in _texts(sample.meta) if not languages or one.language in languages]
    fields = [
        (name, _cut(str(sample.meta[name]))) for name in SHOWN_FIELDS if sample.meta.get(name)
    ]
    return Card(split, row, sample.key, panels_of(sample), texts, fields)


def _texts(meta: dict[str, Any]) -> Iterator[Said]:
    for kind in ("captions", "transcripts"):
        for language, texts in (meta.get(kind) or {}).items():
            yield from (Said(kind, language, _cut(text)) for text in texts)
    segments = meta.get("segments")
    for one in segments if isinstance(segments, list) else []:
        if isinstance(one, dict) and isinstance(one.get("text"), str):
            times = f"{one.get('start_s', '?')}-{one.get('end_s', '?')} s"
            yield Said("segments", str(one.get("language", "")), _cut(f"[{times}] {one['text']}"))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "\u2026"

"""Pass 1: one part of a shard through the stages, into one table.

A part is a run of at most PART_ROWS rows of one shard. Its table (an Arrow file) has a row per
item: what dropped it and why, scores, signatures, and what of its JSON changes. An item that a
stage drops meets no later stage. It is a function of the part's bytes and the pipeline alone, so
parts can be scored anywhere, in any order, again. Whatever an item does wrong ends in its row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from carillon.engine.data.curate.item import Item
from carillon.engine.data.curate.stage import Finding, SetStage, Stage
from carillon.engine.data.samples import SampleError
from carillon.engine.data.shards import Split

PART_ROWS = 2048
PASSED, UNREADABLE, DAMAGED = -1, -2, -3
_MAX_REASON_CHARS = 300


class Part(NamedTuple):
    """Rows [start, end) of a split of the input `source`; the parts of all inputs are numbered."""

    number: int
    source: int
    split: str
    start: int
    end: int


@dataclass
class Row:
    """What pass 1 finds of one item; `dropped_by` is a stage's place or one of the above."""

    key: str
    dropped_by: int = PASSED
    reason: str = ""
    flags: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    noted: dict[str, dict[str, float]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    captions_removed: dict[str, int] = field(default_factory=dict)
    signatures: dict[int, bytes] = field(default_factory=dict)
    split: str = ""
    quality: float = 0.0
    licence: str = ""
    languages_before: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0


def schema(stages: Sequence[Stage]) -> pa.Schema:
    """The columns of a part's table."""
    fields = [
        pa.field("key", pa.string()),
        pa.field("dropped_by", pa.int16()),
        pa.field("reason", pa.string()),
        pa.field("split", pa.string()),
        pa.field("quality", pa.float64()),
        pa.field("licence", pa.string()),
        pa.field("languages_before", pa.string()),  # JSON, as are the next five
        pa.field("languages", pa.string()),
        pa.field("flags", pa.string()),
        pa.field("noted", pa.string()),
        pa.field("changes", pa.string()),
        pa.field("captions_removed", pa.string()),
        pa.field("size_bytes", pa.int64()),
    ]
    for place, stage in enumerate(stages):
        if isinstance(stage, SetStage):
            fields.append(pa.field(f"signature{place}", pa.binary()))
        else:
            fields += [pa.field(f"score{place}.{n}", pa.float64()) for n in stage.score_names]
    return pa.schema(fields)


def score_part(
    split: Split,
    part: Part,
    stages: Sequence[Stage],
    *,
    skip: Mapping[int, str],
    began: Callable[[int], None],
    only_signatures: bool = False,
) -> pa.Table:
    """The table of one part.

    `skip` has rows that are quarantined unread, with the reason; `began` is told of every row
    before it is touched. With `only_signatures` (an evaluation set) nothing is judged.
    Raises UserError when the shard or its index cannot be read at all.
    """
    rows = []
    for number in range(part.start, part.end):
        began(number)
        if number in skip:
            rows.append(Row(split.key(number), UNREADABLE, skip[number], split=split.name))
        else:
            rows.append(_score(split, number, stages, only_signatures))
    return _table(rows, stages)


def _score(split: Split, number: int, stages: Sequence[Stage], only_signatures: bool) -> Row:
    try:
        sample = split.read(number)
    except SampleError as error:
        kind = DAMAGED if "checksum" in error.reason else UNREADABLE
        return Row(error.key, kind, error.reason[:_MAX_REASON_CHARS], split=split.name)
    item = Item(sample, split.name)
    row = Row(item.key, split=split.name)
    try:
        _describe(item, row)
        for place, stage in enumerate(stages):
            if only_signatures and not isinstance(stage, SetStage):
                continue
            finding = stage.examine(item)
            if finding is not None:
                _apply(place, stage, finding, item, row)
            if row.dropped_by != PASSED:
                break
    # Decoders and models of hostile bytes raise nearly anything; it is the item's fault, and told.
    except (Exception, MemoryError) as error:
        row.dropped_by = UNREADABLE
        row.reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
        if isinstance(error, ValueError):
            row.reason = str(error)[:_MAX_REASON_CHARS]
    return row


def _describe(item: Item, row: Row) -> None:
    row.licence = str(item.meta.get("licence") or "unstated")[:80]
    row.languages_before = {language: len(texts) for language, texts in item.captions.items()}
    row.languages = row.languages_before
    row.size_bytes = sum(map(len, item.members.values()))
    row.quality = float(row.size_bytes)
    if item.has("image"):
        width, height = item.picture_size
        row.quality = float(width * height)


def _apply(place: int, stage: Stage, finding: Finding, item: Item, row: Row) -> None:
    if finding.signature is not None:
        row.signatures[place] = finding.signature
    if finding.scores:
        row.scores[str(place)] = dict(finding.scores)
        if stage.action == "annotate":
            row.noted[stage.label] = {k: round(v, 6) for k, v in finding.scores.items()}
    if finding.reason is not None:
        reason = finding.reason[:_MAX_REASON_CHARS]
        if stage.action == "drop":
            row.dropped_by, row.reason = place, reason
            return
        if stage.action == "flag":
            row.flags[stage.label] = reason
    if finding.captions is not None and finding.captions != item.captions:
        removed = _count(item.captions) - _count(finding.captions)
        if removed:
            row.captions_removed[stage.label] = removed
        item.captions = finding.captions
        row.changes["captions"] = finding.captions
        row.languages = {language: len(texts) for language, texts in finding.captions.items()}
    if finding.meta:
        row.changes |= finding.meta
        item.meta.update(finding.meta)
    if finding.split is not None:
        row.split = finding.split


def _count(captions: Mapping[str, Sequence[str]]) -> int:
    return sum(map(len, captions.values()))


def _table(rows: Sequence[Row], stages: Sequence[Stage]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in rows]
        for name in ("key", "dropped_by", "reason", "split", "quality", "licence", "size_bytes")
    }
    for name in ("languages_before", "languages", "flags", "noted", "changes", "captions_removed"):
        columns[name] = [_json(getattr(row, name)) for row in rows]
    for place, stage in enumerate(stages):
        if isinstance(stage, SetStage):
            columns[f"signature{place}"] = [row.signatures.get(place) for row in rows]
        else:
            for name in stage.score_names:
                found = [row.scores.get(str(place), {}).get(name) for row in rows]
                columns[f"score{place}.{name}"] = found
    shape = schema(stages)
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in shape], schema=shape)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""

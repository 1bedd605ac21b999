"""The items table of a shard: a row per sample with what is asked about it without its media.

`X.items.parquet` stands beside `X.tar`. Statistics, comparisons, licence tables and curation read
it by columns, so that they cost bytes per item, not pictures. Rows stand in the order of the shard.
The same samples give the same bytes with one version of pyarrow.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.samples import MODALITIES, main_member, modality_of

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the media, see media_sha256
        pa.field("size_bytes", pa.int64(), nullable=False),  # of the media and the JSON
        pa.field("modalities", pa.list_(pa.string()), nullable=False),
        pa.field("languages", pa.list_(pa.string()), nullable=False),
        pa.field("licence", pa.string()),
        pa.field("licence_source", pa.string()),
        pa.field("source", pa.string()),
        pa.field("width", pa.int32()),  # of the main picture or video
        pa.field("height", pa.int32()),
        pa.field("duration_s", pa.float64()),  # of the main sound or video
    ]
)


def media_sha256(members: Mapping[str, bytes]) -> str:
    """SHA-256 of a sample's media, one after another by their names: of one, that of its file."""
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(members[name])
    return digest.hexdigest()


def modalities_of(members: Mapping[str, bytes], meta: Mapping[str, Any]) -> list[str]:
    """The modalities of a sample, `text` where it has captions or transcripts."""
    held = {modality_of(name) for name in members}
    text = meta.get("captions") or meta.get("transcripts")
    return [name for name in MODALITIES if name in held] + (["text"] if text else [])


def languages_of(meta: Mapping[str, Any]) -> list[str]:
    """The languages of a sample's captions and transcripts."""
    return sorted({*(meta.get("captions") or {}), *(meta.get("transcripts") or {})})


def item_row(
    key: str, members: Mapping[str, bytes], meta: Mapping[str, Any], meta_bytes: int
) -> dict[str, Any]:
    """A sample's row; `meta_bytes` is the size of its JSON."""
    return {
        "key": key,
        "sha256": media_sha256(members),
        "size_bytes": sum(map(len, members.values())) + meta_bytes,
        "modalities": modalities_of(members, meta),
        "languages": languages_of(meta),
        **{name: _text(meta.get(name)) for name in ("licence", "licence_source", "source")},
        "width": _fact(members, meta, ("image", "video"), "width", int),
        "height": _fact(members, meta, ("image", "video"), "height", int),
        "duration_s": _fact(members, meta, ("video", "audio"), "duration_s", float),
    }


def items_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of an items file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_items(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The items of a shard. Raises UserError when the file cannot be read."""
    try:
        return pq.read_table(path, columns=list(columns) if columns is not None else None)
    except OSError as error:
        raise UserError(f"the items {path} cannot be read: {explained(error)}") from None
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"the items {path} cannot be read: {error}. Copy or build the set again."
        ) from None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _fact(
    members: Mapping[str, bytes],
    meta: Mapping[str, Any],
    modalities: Sequence[str],
    field: str,
    kind: type[int] | type[float],
) -> int | float | None:
    """A field of meta.media of the main member of the first of the modalities that has it."""
    facts = meta.get("media")
    if not isinstance(facts, Mapping):
        return None
    for modality in modalities:
        of_member = facts.get(main_member(members, modality) or "")
        value = of_member.get(field) if isinstance(of_member, Mapping) else None
        if isinstance(value, (int, float)) and 0 <= value < 2**31:
            return kind(value)
    return None

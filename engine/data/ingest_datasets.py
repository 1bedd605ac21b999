"""Items of a Hugging Face datasets folder: parquet or arrow files with media as bytes and paths.

Both layouts are read without that library: `data/train-00000-of-00002.parquet` as in a repository,
and what `save_to_disk` writes (arrow streams, a folder a split). A row is an item; each column of
media is a member, the first of them without a label. Columns with the usual names are captions and
transcripts, whole numbers that the file's features name as classes become their names, other plain
columns are kept. Splits keep their names; `valid`, `val` and `dev` are `validation`. Parquet files
without media are tables of their own, as lists of URLs in parts are.
Left out: lists of media, scripts, and anything that is not on this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carillon.engine.config import UserError
from carillon.engine.data.ingest_columns import (
    Found,
    plain_values,
    text_columns,
    texts_of,
)
from carillon.engine.data.ingest_folders import inside
from carillon.engine.data.ingest_items import (
    MEDIA_SUFFIXES,
    Columns,
    Entry,
    Inline,
    Item,
    LocalFile,
    Rejected,
    Where,
)
from carillon.engine.data.ingest_table_source import read_table, suffix_of
from carillon.engine.data.ingest_tables import TABLE_READERS, Row, batch_rows, holds_bytes

if TYPE_CHECKING:
    import pyarrow

_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
_SUFFIXES = (".parquet", ".arrow")
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test)(?=[-_.]|$)")
_SPLIT_NAMES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_NOT_A_LABEL = re.compile(r"[^a-z0-9]+")
_BATCH_ROWS = 32


def is_datasets_folder(folder: Path) -> bool:
    """Whether a folder is laid out as one: marked as one, or with parquet or arrow files and no
    media beside them."""
    if any((folder / name).is_file() for name in _MARKS):
        return True
    if any(path.suffix.lower() in MEDIA_SUFFIXES for path in folder.iterdir()):
        return False
    return any(
        next(folder.glob(f"{place}*{suffix}"), None)
        for suffix in _SUFFIXES
        for place in ("", "data/")
    )


def read_datasets_folder(
    root: Path, columns: Columns, *, scratch: Path, allow_outside: bool
) -> Iterator[Entry]:
    """The items of all files in order. Raises UserError when a file cannot be read."""
    files = sorted(path for suffix in _SUFFIXES for path in root.rglob(f"*{suffix}"))
    files = [path for path in files if not path.name.startswith("cache-")]
    if not files:
        raise UserError(f"{root} holds no parquet or arrow file, subfolders included")
    for path in files:
        if path.suffix == ".parquet" and not TABLE_READERS[".parquet"](path).binary:
            source = path.relative_to(root.parent).as_posix()
            yield from read_table(
                path, columns, source=source, scratch=scratch, allow_outside=allow_outside
            )
        else:
            yield from _read_file(root, path, columns, allow_outside)


def _read_file(root: Path, path: Path, columns: Columns, allow_outside: bool) -> Iterator[Entry]:
    shown = path.relative_to(root).as_posix()
    number = 0
    for schema, batch in _batches(path):
        media = [field.name for field in schema if holds_bytes(field.type)]
        if columns.image is not None and columns.image in media:
            media = [columns.image, *(name for name in media if name != columns.image)]
        if not media:
            raise UserError(f"{path} has no column of media; it has {', '.join(schema.names)}")
        found = _text_columns(path, schema.names, media, columns)
        classes = _classes(schema)
        for row in batch_rows(batch):
            number += 1
            name = f"{shown}#{number}"
            if isinstance(row, str):
                yield Rejected(source=root.resolve().name, image=name, reason=row)
                continue
            try:
                yield _item(root, name, row, media, found, classes, columns, allow_outside, shown)
            except ValueError as error:
                yield Rejected(source=root.resolve().name, image=name, reason=str(error))


def _item(
    root: Path,
    name: str,
    row: Row,
    media: list[str],
    found: Found,
    classes: dict[str, list[str]],
    columns: Columns,
    allow_outside: bool,
    shown: str,
) -> Item:
    members: dict[str, Where] = {}
    for column in media:
        where, stated = _where(root, row.get(column), allow_outside)
        if where is not None:
            label = _NOT_A_LABEL.sub("-", column.lower()).strip("-") if members else ""
            members[f"{label}.{stated}" if label else stated] = where
    if not members:
        raise ValueError(f"no bytes and no path in {', '.join(media)}")
    language = str(row.get(found.language or "") or columns.default_language).strip()
    extra = plain_values(row, {*media, *found.names})
    for column, names in classes.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            extra[column] = names[value]
    return Item(
        source=root.resolve().name,
        name=name,
        members=members,
        captions=texts_of(row, found.captions, language),
        transcripts=texts_of(row, found.transcripts, language),
        extra=extra,
        split=_split(shown),
        may_be_silent=bool(extra),
    )


def _where(root: Path, value: object, allow_outside: bool) -> tuple[Where | None, str]:
    """Where a cell's medium is, and the suffix that its path states."""
    if isinstance(value, bytes):
        return Inline(value), ""
    if not isinstance(value, dict):
        return None, ""
    path = value.get("path")
    stated = suffix_of(path) if isinstance(path, str) else ""
    if isinstance(value.get("bytes"), bytes):
        return Inline(value["bytes"]), stated
    if not isinstance(path, str) or not path:
        return None, ""
    return LocalFile(inside(root, path, allow_outside)), stated


def _text_columns(path: Path, names: list[str], media: list[str], columns: Columns) -> Found:
    for name in (*columns.captions, *columns.transcripts, columns.language or ""):
        name = name.rpartition("=")[2]
        if name and name not in names:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(names)}")
    free = [name for name in names if name not in media]
    return text_columns(media[0], free, columns)


def _batches(path: Path) -> Iterator[tuple[pyarrow.Schema, pyarrow.RecordBatch]]:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield file.schema_arrow, batch
            return
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            stream = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
            batches = (
                (stream.get_batch(number) for number in range(stream.num_record_batches))
                if is_file
                else stream
            )
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield stream.schema, batch.slice(start, _BATCH_ROWS)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _classes(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Names of classes by column, from the features that the library keeps in the file."""
    try:
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _split(shown: str) -> str | None:
    """The split that a file's path names, from its own name up."""
    for part in reversed(shown.lower().split("/")):
        if match := _SPLIT.match(part):
            return _SPLIT_NAMES.get(match[1], match[1])
    return None

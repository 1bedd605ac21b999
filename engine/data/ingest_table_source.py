"""Items of a table: rows with a path, a URL or the bytes of a medium, and its texts.

Rows that name the same medium are one item with several texts; rows that hold bytes are items of
their own. A path must lie inside the table's folder, links resolved, unless `allow_outside`; http
and https URLs are fetched by the rules of fetch.py, s3:// and the like by store.py. A row that
breaks a rule becomes a rejection and the next one is read.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from carillon.engine.data.ingest_columns import Found, find_columns, plain_values, texts_of
from carillon.engine.data.ingest_folders import inside
from carillon.engine.data.ingest_grouping import grouped
from carillon.engine.data.ingest_items import (
    MEDIA_SUFFIXES,
    Columns,
    Entry,
    Inline,
    Item,
    LocalFile,
    Rejected,
    Span,
    Url,
    Where,
    merge_texts,
)
from carillon.engine.data.ingest_tables import TABLE_READERS, Row
from carillon.engine.data.store import is_remote

_REJECTED = "row "


def read_table(
    path: Path, columns: Columns, *, source: str, scratch: Path, allow_outside: bool
) -> Iterator[Entry]:
    """The items of a local table. Raises UserError when it cannot be read."""
    table = TABLE_READERS[path.suffix.lower()](path)
    found = find_columns(str(path), table.names, columns)
    rows = enumerate(table.rows(found.names), start=1)
    if found.media in table.binary:
        for number, row in rows:
            yield _embedded(source, number, row, found, columns, path.parent, allow_outside)
        return
    stat = path.stat()
    version = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{columns}"
    file = scratch / f"{hashlib.sha256(version.encode()).hexdigest()[:24]}.sqlite"
    contents = (_content(number, row, found, columns) for number, row in rows)
    for name, listed in grouped(file, version, contents):
        yield _item(source, name, listed, path.parent, allow_outside)


def _content(
    number: int, row: Row | str, found: Found, columns: Columns
) -> tuple[str, dict[str, Any]]:
    """What is kept of a row until its medium's turn comes, by the medium's name."""
    stand_in = f"\0{_REJECTED}{number}"
    if isinstance(row, str):
        return stand_in, {"reason": row, "name": f"{_REJECTED}{number}"}
    name = _name(row.get(found.media))
    try:
        if not name:
            raise ValueError(f"the column {found.media!r} is empty")
        captions, transcripts = _texts(row, found, columns)
    except ValueError as error:
        return stand_in, {"reason": str(error), "name": name or f"{_REJECTED}{number}"}
    extra = plain_values(row, found.names)
    return name, {"captions": captions, "transcripts": transcripts, "extra": extra}


def _texts(
    row: Row, found: Found, columns: Columns
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    language = str(row.get(found.language or "") or columns.default_language).strip()
    captions = texts_of(row, found.captions, language)
    transcripts = texts_of(row, found.transcripts, language)
    for texts in (captions, transcripts):
        for listed in texts.values():
            for text in listed:
                if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
                    raise ValueError("a caption holds a lone surrogate, so it is not valid Unicode")
    if not captions and not transcripts:
        raise ValueError("no caption in this row")
    return captions, transcripts


def _name(value: object) -> str:
    text = "" if value is None else str(value).strip()
    return posixpath.normpath(text) if text and "://" not in text else text


def _item(
    source: str, name: str, listed: list[dict[str, Any]], folder: Path, allow_outside: bool
) -> Entry:
    if name.startswith("\0"):
        return Rejected(source=source, image=listed[0]["name"], reason=listed[0]["reason"])
    try:
        where = _where(name, folder, allow_outside)
    except (ValueError, OSError) as error:
        return Rejected(source=source, image=name, reason=str(error))
    item = Item(source=source, name=name, members={suffix_of(name): where})
    for content in listed:
        merge_texts(item.captions, content["captions"])
        merge_texts(item.transcripts, content["transcripts"])
    item.extra = listed[0]["extra"]
    return item


def _where(name: str, folder: Path, allow_outside: bool) -> Where:
    scheme = name.partition("://")[0].lower()
    if scheme in ("http", "https") and is_remote(name):
        return Url(name)
    if scheme in ("s3", "gs", "gcs", "az", "abfs", "abfss") and is_remote(name):
        return Span(name)
    return LocalFile(inside(folder, name, allow_outside))


def suffix_of(name: str) -> str:
    """The suffix that a path or URL states, if it is a medium's; else empty."""
    path = urlsplit(name).path if is_remote(name) else name
    suffix = posixpath.splitext(path)[1].lower()
    return suffix[1:] if suffix in MEDIA_SUFFIXES else ""


def _embedded(
    source: str,
    number: int,
    row: Row | str,
    found: Found,
    columns: Columns,
    folder: Path,
    allow_outside: bool,
) -> Entry:
    """The item of a row that holds its medium's bytes, or the path of a file beside the table."""
    name = f"row-{number}"
    if isinstance(row, str):
        return Rejected(source=source, image=f"{_REJECTED}{number}", reason=row)
    value = row.get(found.media)
    data, path = value, None
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        name = str(path or name)
    try:
        captions, transcripts = _texts(row, found, columns)
        if isinstance(data, bytes):
            where: Where = Inline(data)
        elif path:
            where = _where(_name(path), folder, allow_outside)
        else:
            raise ValueError(f"the column {found.media!r} is empty")
    except (ValueError, OSError) as error:
        return Rejected(source=source, image=name, reason=str(error))
    return Item(
        source=source,
        name=name,
        ref=f"row-{number}",
        members={suffix_of(name): where},
        captions=captions,
        transcripts=transcripts,
        extra=plain_values(row, found.names),
    )

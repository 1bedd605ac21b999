"""Which reader a source of an ingest belongs to, and its items one after another.

A source is a folder, a table, a tar or a datasets folder, by path, or by URL where it lies in a
store. A remote table is copied first, since it is read in no order of its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.ingest_datasets import is_datasets_folder, read_datasets_folder
from carillon.engine.data.ingest_folders import read_folder, read_remote_folder
from carillon.engine.data.ingest_items import Columns, Entry
from carillon.engine.data.ingest_table_source import read_table
from carillon.engine.data.ingest_tables import TABLE_READERS
from carillon.engine.data.ingest_tars import read_tar
from carillon.engine.data.store import is_remote, open_blob

_COPY_BYTES = 8 << 20
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def source_name(given: str) -> str:
    """The name that items of a source have in front of theirs."""
    return given.rstrip("/").rpartition("/")[2] if is_remote(given) else Path(given).name


def source_version(given: str) -> str:
    """What changes when a source is another one; of a folder its place alone."""
    if is_remote(given) or not os.path.isfile(given):
        return given if is_remote(given) else os.path.realpath(given)
    stat = os.stat(given)
    return f"{os.path.realpath(given)} {stat.st_size} {stat.st_mtime_ns}"


def read_source(
    given: str, columns: Columns, *, scratch: Path, allow_outside: bool
) -> Iterator[Entry]:
    """All entries of one source in a fixed order; `scratch` is a folder for copies.

    Raises UserError when the source as a whole cannot be read.
    """
    suffix = os.path.splitext(given)[1].lower()
    if suffix in _COMPRESSED:
        raise UserError(f"{given} is compressed; unpack it first (tar -xf, gunzip, unzip)")
    if suffix == ".tar":
        return read_tar(given)
    if is_remote(given):
        if suffix in TABLE_READERS:
            return _table(given, _copied(given, scratch), columns, scratch, allow_outside)
        if given.startswith("http"):
            raise UserError(
                f"{given}: of a web server a .tar or a table ({', '.join(TABLE_READERS)}) is read, "
                "such as a list of URLs with their captions"
            )
        return read_remote_folder(given)
    path = Path(given)
    if path.is_dir():
        if is_datasets_folder(path):
            return read_datasets_folder(path, columns, scratch=scratch, allow_outside=allow_outside)
        return read_folder(path, allow_outside=allow_outside)
    if not path.is_file():
        hint = " Patterns are the shell's: give the files without quotes." if "*" in given else ""
        raise UserError(f"{given} does not exist. Give a folder, csv, tsv, jsonl or parquet.{hint}")
    if suffix not in TABLE_READERS:
        raise UserError(
            f"{given} cannot be ingested: {suffix or 'no suffix'} is none of "
            f"{', '.join((*TABLE_READERS, '.tar'))}, and it is no folder."
        )
    return _table(given, path, columns, scratch, allow_outside)


def _table(
    given: str, path: Path, columns: Columns, scratch: Path, allow_outside: bool
) -> Iterator[Entry]:
    return read_table(
        path,
        columns,
        source=source_name(given),
        scratch=scratch,
        allow_outside=allow_outside,
    )


def _copied(url: str, scratch: Path) -> Path:
    """A copy of a remote table, made once an ingest. Raises UserError when it cannot be read."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = scratch / f"{digest}{os.path.splitext(url)[1].lower()}"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    try:
        blob = open_blob(url)
        with partial.open("wb") as file:
            for offset in range(0, blob.size_bytes, _COPY_BYTES):
                file.write(blob.read(offset, _COPY_BYTES))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {explained(error)}") from None
    partial.rename(path)
    return path

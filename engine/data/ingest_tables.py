"""Rows of csv, tsv, jsonl and parquet files as plain dictionaries.

A reader gives the column names, those that hold bytes, and a function that reads the rows; a row
that cannot be read is its reason, a string, and the next one follows. A file that cannot be read at
all raises UserError. The function takes the names of the columns in use: of a parquet only these
are read and those whose values are text, numbers or truth values; so an extra column of timestamps
or vectors does no harm. Rows come one after another, whatever the file's size.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from carillon.engine.config import UserError

if TYPE_CHECKING:
    import pyarrow

Row = Mapping[str, Any]
ReadRows = Callable[[Collection[str]], Iterator[Row | str]]


class Table(NamedTuple):
    """A table's columns, and how its rows are read."""

    names: Sequence[str]
    rows: ReadRows
    binary: frozenset[str] = frozenset()


RowReader = Callable[[Path], Table]

_MAX_FIELD_BYTES = 16 << 20
_ROWS, _EMBEDDED_ROWS = 1024, 32  # held at once; media may have megabytes each


def _open_text(path: Path) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, which cost their row, not the file."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(
                f"{path} is UTF-16, and UTF-8 is read: convert it, as in "
                f"'iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}'"
            )
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(path: Path) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_MAX_FIELD_BYTES)  # the default refuses whole files for one long field

    def rows() -> Iterator[list[str]]:
        with _open_text(path) as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}") from None

    lines = rows()
    names = next(lines, [])
    if len(set(names)) != len(names):
        raise UserError(f"{path}: the header {', '.join(names)} names a column twice")

    def records(_used: Collection[str]) -> Iterator[Row | str]:
        for line in lines:
            if not line:
                continue
            if len(line) != len(names):
                yield f"{len(line)} fields where the header has {len(names)}"
            else:
                yield dict(zip(names, line, strict=True))

    return Table(names, records)


def _jsonl_rows(path: Path) -> Table:
    names: dict[str, None] = {}
    for row in _json_lines(path):
        if not isinstance(row, str):
            names.update(dict.fromkeys(row))
    return Table(list(names), lambda _used: _json_lines(path))


def _json_lines(path: Path) -> Iterator[Row | str]:
    with _open_text(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"no JSON: {error}"
                continue
            yield row if isinstance(row, dict) else "the line is no JSON object"


def _parquet_rows(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file that can be read: {error}") from None

    schema = file.schema_arrow
    if len(set(schema.names)) != len(schema.names):
        raise UserError(f"{path}: the header {', '.join(schema.names)} names a column twice")

    binary = frozenset(field.name for field in schema if holds_bytes(field.type))

    def rows(used: Collection[str]) -> Iterator[Row | str]:
        read = [field.name for field in schema if field.name in used or _is_plain(field.type)]
        try:
            num_rows = _EMBEDDED_ROWS if binary & set(read) else _ROWS
            for batch in file.iter_batches(batch_size=num_rows, columns=read):
                yield from batch_rows(batch.select(read))  # `a` also gave `a.b`
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: {error}") from None

    return Table(schema.names, rows, binary)


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether values are bytes, or what other tools write for media: bytes and a path."""
    from pyarrow import types

    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_plain(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    return types.is_boolean(kind) or any(check(kind) for check in checks)


def batch_rows(batch: pyarrow.RecordBatch) -> Iterator[Row | str]:
    """Rows one by one where some value has no Python form: text that is not UTF-8, odd times."""
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError):
        pass
    else:
        yield from rows
        return
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield f"a value cannot be read: {error}"


TABLE_READERS: dict[str, RowReader] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".parquet": _parquet_rows,
}

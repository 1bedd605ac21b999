"""Rows of csv, tsv, jsonl and parquet files as plain dictionaries.

A reader gives the column names and then the rows; a row that cannot be read is its reason, a
string, and the next one follows. A file that cannot be read at all raises UserError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError

Row = Mapping[str, Any]
RowReader = Callable[[Path], tuple[Sequence[str], Iterator[Row | str]]]

_MAX_FIELD_BYTES = 16 << 20


def _csv_rows(path: Path) -> tuple[Sequence[str], Iterator[Row | str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_MAX_FIELD_BYTES)  # the default refuses whole files for one long field

    def rows() -> Iterator[list[str]]:
        # Bytes that are not UTF-8 become surrogates, which cost their row, not the file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                yield from reader
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}") from None

    lines = rows()
    names = next(lines, [])
    if len(set(names)) != len(names):
        raise UserError(f"{path}: the header {', '.join(names)} names a column twice")

    def records() -> Iterator[Row | str]:
        for line in lines:
            if not line:
                continue
            if len(line) != len(names):
                yield f"{len(line)} fields where the header has {len(names)}"
            else:
                yield dict(zip(names, line, strict=True))

    return names, records()


def _jsonl_rows(path: Path) -> tuple[Sequence[str], Iterator[Row | str]]:
    names: dict[str, None] = {}
    for row in _json_lines(path):
        if not isinstance(row, str):
            names.update(dict.fromkeys(row))
    return list(names), _json_lines(path)


def _json_lines(path: Path) -> Iterator[Row | str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"no JSON: {error}"
                continue
            yield row if isinstance(row, dict) else "the line is no JSON object"


def _parquet_rows(path: Path) -> tuple[Sequence[str], Iterator[Row | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file that can be read: {error}") from None

    def rows() -> Iterator[Row | str]:
        try:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: {error}") from None

    return file.schema_arrow.names, rows()


TABLE_READERS: dict[str, RowReader] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".parquet": _parquet_rows,
}

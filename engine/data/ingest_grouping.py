"""Rows of a table that name the same medium brought together, on disk.

A caption a row is usual, and the rows of one picture need not be neighbours. So rows go into a
SQLite file in the order of the first row of their medium, and come out of it in that order: memory
stays flat, whatever the table's size. A finished file is used again by a resumed ingest.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

_SCHEMA = """
create table names (hash blob primary key, first integer) without rowid;
create table rows (first integer, number integer, name text, content text,
                   primary key (first, number)) without rowid;
"""


def grouped(
    file: Path, version: str, rows: Iterable[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(name, contents of its rows) in the order of first rows.

    `version` names the state of the table: a file of another one is made anew.
    """
    if not _is_of(file, version):
        _fill(file, version, rows)
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        found = database.execute("select first, name, content from rows order by first, number")
        for _, group in groupby(found, key=itemgetter(0)):
            listed = list(group)
            yield listed[0][1], [json.loads(content) for _, _, content in listed]


def _is_of(file: Path, version: str) -> bool:
    if not file.exists():
        return False
    with closing(sqlite3.connect(file)) as database:
        try:
            (found,) = database.execute("select version from finished").fetchone()
        except (sqlite3.Error, TypeError):
            return False
    return bool(found == version)


def _fill(file: Path, version: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    file.unlink(missing_ok=True)
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        # Made again when cut short: no need to wait for the disk, nor for a journal.
        database.executescript("pragma synchronous=off; pragma journal_mode=off;" + _SCHEMA)
        database.execute("begin")
        for number, (name, content) in enumerate(rows):
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            database.execute("insert or ignore into names values (?, ?)", (digest, number))
            (first,) = database.execute(
                "select first from names where hash = ?", (digest,)
            ).fetchone()
            database.execute(
                "insert into rows values (?, ?, ?, ?)", (first, number, name, json.dumps(content))
            )
        database.execute("create table finished (version text)")
        database.execute("insert into finished values (?)", (version,))
        database.execute("commit")

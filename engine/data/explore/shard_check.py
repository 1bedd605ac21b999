"""The check of one shard: its files' SHA-256, each sample's bytes, and what its items say of it.

One damaged file must not hide what else is wrong, so each check goes on after one that failed. Of
many problems of one shard only the first are listed, all are counted: an index of another set fits
no sample at all.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.items import SCHEMA, item_row, modalities_of, read_items
from carillon.engine.data.manifest import ShardFile
from carillon.engine.data.samples import SampleError, parse_meta
from carillon.engine.data.shard_index import IndexReader, IndexRow, members_of
from carillon.engine.data.shards import open_dataset
from carillon.engine.data.tombstones import Tombstones, tombstones_of

MAX_LISTED = 1000


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, or with one item in it."""

    file: str
    key: str | None
    what: str


class ShardTask(NamedTuple):
    """A shard of the set at `source`, a folder or, of plain tars, what open_dataset takes."""

    source: str
    split: str
    start: int
    files: ShardFile


@dataclass
class ShardReport:
    """What was found in a shard."""

    num_samples: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, file: str, what: str, key: str | None = None) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(Problem(file, key, what))

    def count(self, members: Any, meta: dict[str, Any]) -> None:
        """As the writer counted it for the manifest."""
        languages = self.counts.setdefault("languages", Counter())
        for name in ("captions", "transcripts"):
            for language, texts in meta.get(name, {}).items():
                languages[language] += len(texts)
        self.counts.setdefault("modalities", Counter()).update(modalities_of(members, meta))
        licence = str(meta.get("licence") or "unstated")
        self.counts.setdefault("licences", Counter())[licence] += 1


def check_shard(task: ShardTask) -> ShardReport:
    """Check a shard; nothing that is wrong with it raises."""
    report = ShardReport()
    if task.files.items is None:
        _check_plain_tar(task, report)
        return report
    folder, files = Path(task.source), task.files
    for name, sha256 in (
        (files.file, files.sha256),
        (files.index, files.index_sha256),
        (files.items, files.items_sha256),
    ):
        _check_sum(folder / str(name), sha256, report)
    try:
        tombstones = tombstones_of([folder])
    except UserError as error:
        report.add("tombstones.json", str(error))
        tombstones = Tombstones()
    try:
        index = IndexReader(
            folder / files.index,
            num_rows=files.num_samples,
            shard_size_bytes=files.size_bytes,
        )
        tar = os.open(folder / files.file, os.O_RDONLY | os.O_CLOEXEC)
    except UserError as error:
        report.add(files.index, str(error))
        return report
    except OSError:
        return report  # told by its checksum
    try:
        _check_samples(tar, index, _items(folder, files, report), tombstones, files, report)
    finally:
        os.close(tar)
    return report


def _check_sum(path: Path, expected: str | None, report: ShardReport) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        report.add(path.name, f"it cannot be read: {explained(error)}")
        return
    if found != expected:
        report.add(path.name, f"its SHA-256 is {found[:16]}, dataset.json says {expected:.16}")


def _items(folder: Path, files: ShardFile, report: ShardReport) -> list[dict[str, Any]] | None:
    """The rows of the items; none, told, when they cannot be this shard's."""
    try:
        items = read_items(folder / str(files.items))
    except UserError as error:
        report.add(str(files.items), str(error))
        return None
    if items.schema.names != SCHEMA.names or items.num_rows != files.num_samples:
        report.add(
            str(files.items), f"it has {items.num_rows:,} rows for {files.num_samples:,} samples"
        )
        return None
    rows: list[dict[str, Any]] = items.to_pylist()
    return rows


def _check_samples(
    tar: int,
    index: IndexReader,
    items: list[dict[str, Any]] | None,
    tombstones: Tombstones,
    files: ShardFile,
    report: ShardReport,
) -> None:
    for row in range(files.num_samples):
        try:
            at = index.row(row)
        except UserError as error:
            report.add(files.index, str(error))
            continue
        key = at.key.decode("utf-8", "replace")
        try:
            found = _described(tar, at, key, report)
        except (OSError, ValueError) as error:
            reason = explained(error) if isinstance(error, OSError) else str(error)
            report.add(files.file, reason, key)
            continue
        report.num_samples += 1
        if items is not None and found != items[row]:
            wrong = [name for name in SCHEMA.names if found[name] != items[row][name]]
            report.add(str(files.items), f"it says other {', '.join(wrong)} than the sample", key)
        refusal = tombstones.refusal(key, found["sha256"])
        if refusal is not None:
            report.add(files.file, refusal, key)


def _described(tar: int, at: IndexRow, key: str, report: ShardReport) -> dict[str, Any]:
    """The row that the items should have. Raises ValueError for a damaged sample."""
    span = os.pread(tar, at.size, at.offset)
    if zlib.crc32(span) != at.crc32:
        raise ValueError("its bytes do not match their checksum")
    members = members_of(key, span)
    text = members.pop("json", None)
    meta = parse_meta(text, members.pop("txt", None))
    report.count(members, meta)
    return item_row(key, members, meta, len(text or b""))


def _check_plain_tar(task: ShardTask, report: ShardReport) -> None:
    """Of a foreign tar there is only what was recorded when it was first indexed."""
    path = Path(task.files.file)
    _check_sum(path, task.files.sha256, report)
    try:
        split = open_dataset(task.source).splits[task.split]
    except UserError as error:
        report.add(path.name, str(error))
        return
    for row in range(task.start, task.start + task.files.num_samples):
        try:
            split.read(row)
            report.num_samples += 1
        except SampleError as error:
            report.add(path.name, error.reason, error.key)
        except UserError as error:
            report.add(path.name, str(error))

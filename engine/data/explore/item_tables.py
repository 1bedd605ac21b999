"""What the items of a set say of themselves, shard by shard, without their media.

The items tables (items.py) answer most questions by columns. What stands in a sample's JSON alone
(captions, authors, any other field) is read by the headers between the members, and the media are
stepped over: the checksum, which is of a whole sample, is not checked then (`data verify` does).
Plain tars have no items tables: theirs are made by reading every sample.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.items import SCHEMA, item_row, read_items
from carillon.engine.data.manifest import ShardFile
from carillon.engine.data.samples import SampleError, parse_meta
from carillon.engine.data.shard_index import TEXT_MEMBERS, IndexReader
from carillon.engine.data.shards import Dataset
from carillon.engine.data.tar_members import iter_members

_MAX_TEXT_BYTES = 64 << 20


class Shard(NamedTuple):
    """One shard of a set: its place there, and the row of its split at which it begins."""

    dataset: Dataset
    split: str
    start: int
    files: ShardFile


class Meta(NamedTuple):
    """The JSON of a sample, or why it cannot be used, beside the names of its media."""

    row: int
    key: str
    members: tuple[str, ...]
    meta: dict[str, Any]
    error: str | None = None


def shards_of(dataset: Dataset) -> Iterator[Shard]:
    """All shards, split by split."""
    for name, files in dataset.manifest.splits.items():
        start = 0
        for shard in files.shards:
            yield Shard(dataset, name, start, shard)
            start += shard.num_samples


def items_of(shard: Shard, columns: Sequence[str]) -> pa.Table:
    """The rows of a shard's samples; of a sample that cannot be read all but the key is null.

    Raises UserError when the table is damaged or of another shard.
    """
    if shard.files.items is None:
        return _read_from_samples(shard).select(list(columns))
    path = shard.dataset.path / shard.files.items
    table = read_items(path)
    if table.schema.names != SCHEMA.names or table.num_rows != shard.files.num_samples:
        raise UserError(
            f"the items {path} are not those of {shard.files.file}: {table.num_rows:,} rows where "
            f"dataset.json says {shard.files.num_samples:,}. Copy or build the set again."
        )
    return table.select(list(columns))


def metas_of(shard: Shard, rows: Iterable[int]) -> Iterator[Meta]:
    """The JSON of samples, by rows of the split. Raises UserError when a file cannot be read."""
    if shard.files.items is None:
        yield from (_whole(shard, row) for row in rows)
        return
    path = shard.dataset.path / shard.files.file
    index = IndexReader(
        shard.dataset.path / shard.files.index,
        num_rows=shard.files.num_samples,
        shard_size_bytes=shard.files.size_bytes,
    )
    try:
        with path.open("rb") as tar:
            for row in rows:
                yield _stepped_over(tar, index, row, shard.start)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explained(error)}") from None


class _Span(io.RawIOBase):
    """The bytes of one sample as a file of their own."""

    def __init__(self, tar: BinaryIO, offset: int) -> None:
        self._tar, self._offset = tar, offset

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._tar.seek(self._offset + offset)

    def read(self, size: int = -1) -> bytes:
        return self._tar.read(size)


def _stepped_over(tar: BinaryIO, index: IndexReader, row: int, start: int) -> Meta:
    at = index.row(row - start)
    key = at.key.decode("utf-8", "replace")
    texts: dict[str, bytes] = {}
    media: list[str] = []
    try:
        span = cast(BinaryIO, _Span(tar, at.offset))
        for member in iter_members(span, at.size, part=True):
            name = member.name.removeprefix("./").removeprefix(f"{key}.").lower()
            if name not in TEXT_MEMBERS:
                media.append(name)
            elif member.size <= _MAX_TEXT_BYTES:
                tar.seek(at.offset + member.offset)
                texts.setdefault(name, tar.read(member.size))
        meta = parse_meta(texts.get("json"), texts.get("txt"))
    except ValueError as error:
        return Meta(row, key, tuple(media), {}, str(error))
    return Meta(row, key, tuple(media), meta)


def _whole(shard: Shard, row: int) -> Meta:
    split = shard.dataset.splits[shard.split]
    try:
        sample = split.read(row)
    except SampleError as error:
        return Meta(row, error.key, (), {}, error.reason)
    return Meta(row, sample.key, tuple(sample.members), sample.meta)


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Without lone surrogates, which a foreign JSON may hold and no table can."""
    return {name: _without_surrogates(value) for name, value in row.items()}


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _read_from_samples(shard: Shard) -> pa.Table:
    rows: list[dict[str, Any]] = []
    split = shard.dataset.splits[shard.split]
    for row in range(shard.start, shard.start + shard.files.num_samples):
        try:
            sample = split.read(row)
            rows.append(_encodable(item_row(sample.key, sample.members, sample.meta, 0)))
        except SampleError as error:
            rows.append(dict.fromkeys(SCHEMA.names) | {"key": error.key})
    loose = pa.schema([pa.field(field.name, field.type) for field in SCHEMA])
    return pa.Table.from_pylist(rows, loose)

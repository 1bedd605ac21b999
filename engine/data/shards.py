"""Data sets on disk: tar shards with WebDataset naming, read by row number.

A row is one bisection, one index row and one positioned read; the CRC-32 of both is checked before
they are used. Opening reads the manifest and stats the shards: O(shards). Nothing is ever read
whole, so start-up does not grow with the samples of a shard; an index is checked by its header when
its shard is first touched, and row by row from then on. Splits hold no open file until they are
read, so they can be pickled, forked and spawned. At most so many shards stay open; random rows of
more shards than that cost two `open` calls each.
Plain WebDataset tars are indexed once into a cache folder (index_cache.py) and then read alike.
A set may lie behind a URL (store.py): the same reads are then ranges of its objects.
Left out: writing into a finished set.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.index_cache import expand_sources, holds_manifest, indexed_manifest
from carillon.engine.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardFile,
    SplitFiles,
    read_manifest,
)
from carillon.engine.data.samples import RawSample, SampleError, parse_meta
from carillon.engine.data.shard_index import IndexReader, IndexRow, members_of
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.store import Blob, is_remote, join, listed, open_blob

__all__ = ["Dataset", "RawSample", "SampleError", "ShardWriter", "Split", "open_dataset"]

_MAX_OPEN_SHARDS = 128  # two descriptors each (tar and index): far below the usual 1,024


@dataclass(frozen=True)
class _OpenShard:
    """A tar and its index; closed when the last reader lets go."""

    tar: Blob
    index: IndexReader


class Split:
    """The samples of one split as a sequence; safe to share between threads and processes."""

    def __init__(self, name: str, folder: str, files: SplitFiles) -> None:
        self.name = name
        self._folder = folder
        self._shards = files.shards
        self._ends = list(accumulate(shard.num_samples for shard in files.shards))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def key(self, row: int) -> str:
        """The sample's key, from the index alone."""
        number, local = self._locate(row)
        return self._row(number, local)[1].key.decode()

    def read(self, row: int) -> RawSample:
        """Read one sample.

        Raises SampleError when its bytes are damaged or its text cannot be used, UserError when
        its shard or index cannot be read, IndexError for a row outside [0, len).
        """
        number, local = self._locate(row)
        shard, at = self._row(number, local)
        key = at.key.decode()
        try:
            span = shard.tar.read(at.offset, at.size)
        except OSError as error:
            raise self._unreadable(number, error) from None
        if zlib.crc32(span) != at.crc32:
            file = self._shards[number].file
            raise SampleError(key, f"its bytes in {file} do not match their checksum")
        try:
            members = members_of(key, span)
            meta = parse_meta(members.pop("json", None), members.pop("txt", None))
        except ValueError as error:
            raise SampleError(key, str(error)) from None
        return RawSample(key, members, meta)

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of split {self.name!r}, which has {len(self)}")
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _row(self, number: int, local: int) -> tuple[_OpenShard, IndexRow]:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open_shard(number)
            self._open[number] = shard
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard, shard.index.row(local)

    def _open_shard(self, number: int) -> _OpenShard:
        entry = self._shards[number]
        index = IndexReader(
            join(self._folder, entry.index),
            num_rows=entry.num_samples,
            shard_size_bytes=entry.size_bytes,
        )
        try:
            tar = open_blob(join(self._folder, entry.file))
        except OSError as error:
            raise self._unreadable(number, error) from None
        _check_size(tar.place, tar.size_bytes, entry)
        return _OpenShard(tar, index)

    def _unreadable(self, number: int, error: OSError) -> UserError:
        place = join(self._folder, self._shards[number].file)
        return UserError(f"{place} cannot be read: {error.strerror or error}")


@dataclass(frozen=True)
class Dataset:
    """An opened data set; `fingerprint` identifies its bytes wherever they lie.

    `place` is its absolute path or its URL.
    """

    name: str
    fingerprint: str
    place: str
    splits: Mapping[str, Split]
    manifest: Manifest

    @property
    def path(self) -> Path:
        """The folder of a local set. Raises UserError for a remote one."""
        if is_remote(self.place):
            raise UserError(f"{self.place} is remote, and a local data set is needed; copy it")
        return Path(self.place)


def open_dataset(path: str | Path | Sequence[str]) -> Dataset:
    """Open a data set folder, or plain WebDataset tars (folder, file, brace pattern or list).

    Paths or URLs. Plain tars have one split, "all".
    Raises UserError when something is missing or damaged, or a store does not answer.
    """
    if isinstance(path, (str, Path)):
        folder = str(path) if is_remote(str(path)) else os.path.abspath(path)
        if holds_manifest(folder):
            folder = folder.rstrip("/") or folder
            manifest = read_manifest(join(folder, MANIFEST_NAME))
            return _dataset(folder, folder, manifest)
    tars = expand_sources(path)
    index_folder, manifest = indexed_manifest(tars)
    return _dataset(tars[0].place.rpartition("/")[0], str(index_folder), manifest)


def _dataset(place: str, folder: str, manifest: Manifest) -> Dataset:
    shards = [shard for files in manifest.splits.values() for shard in files.shards]
    if is_remote(folder):
        _check_listed(folder, shards)
    else:
        for shard in shards:
            if not is_remote(shard.file):
                _check_local(join(folder, shard.file), shard)
    splits = {name: Split(name, folder, files) for name, files in manifest.splits.items()}
    return Dataset(manifest.name, manifest.fingerprint, place, splits, manifest)


def _check_local(path: str, shard: ShardFile) -> None:
    try:
        size_bytes = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"the shard {path} is missing: {error.strerror}") from None
    _check_size(path, size_bytes, shard)


def _check_listed(folder: str, shards: Sequence[ShardFile]) -> None:
    """By one listing of the folder; where there is none a shard is checked when it is opened."""
    if folder.startswith("http"):
        return
    try:
        found = dict(listed(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    for shard in shards:
        if shard.file not in found:
            raise UserError(f"the shard {join(folder, shard.file)} is missing. Copy the set again.")
        _check_size(join(folder, shard.file), found[shard.file].size_bytes, shard)


def _check_size(place: str, size_bytes: int, shard: ShardFile) -> None:
    if size_bytes != shard.size_bytes:
        raise UserError(
            f"the shard {place} is truncated or altered: {size_bytes:,} bytes where dataset.json "
            f"says {shard.size_bytes:,}. Copy or build the set again."
        )

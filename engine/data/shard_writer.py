"""Writes a data set: everything into a temporary sibling folder, synced, then one rename.

Until the rename nothing stands under the final name, so a killed or failed write is never taken
for a whole set. The bytes follow from the samples and their order alone (no times, no owners):
the same input gives the same fingerprint. A shard is closed once it passes `max_shard_bytes`.
A long build can be kept: `save` makes what was written durable and says what to go on from, and a
writer with that goes on in the same folder, to the same bytes, whatever was written since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from carillon.engine.config import UserError
from carillon.engine.data.items import item_row, items_bytes, modalities_of
from carillon.engine.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    ShardFile,
    SplitFiles,
    manifest_bytes,
)
from carillon.engine.data.publish import check_target, json_of, publish_folder, sync_folder
from carillon.engine.data.samples import MODALITIES, SampleError, clean_captions, modality_of
from carillon.engine.data.shard_index import MAX_KEY_BYTES, IndexRow, index_bytes, safe_name
from carillon.engine.data.tar_members import BLOCK
from carillon.engine.data.tombstones import TOMBSTONES_NAME, tombstones_of

DEFAULT_SHARD_BYTES = 256 << 20
_MEMBER_NAME = re.compile(r"(?:[a-z0-9_-]{1,40}\.){0,2}[a-z0-9]{1,8}")
_MEMBER_RULE = (
    "one is named by its suffix, or by a label of a-z, 0-9, - and _, a dot and its suffix, of "
    + ", ".join(suffix for suffixes in MODALITIES.values() for suffix in suffixes)
)


class _OpenTar:
    """One shard under construction; its SHA-256 runs along with the writing.

    What `save` keeps of it besides the tar is a file of rows outside of the set's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[IndexRow] = []
        self.items: list[dict[str, Any]] = []
        self.size_bytes = 0
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self._num_saved = 0

    @classmethod
    def resumed(cls, path: Path, saved: Mapping[str, int]) -> Self:
        """The shard as it was saved; what came after is cut off. Raises OSError, ValueError."""
        tar = cls.__new__(cls)
        tar.path, tar.rows, tar.items = path, [], []
        tar.size_bytes, tar._num_saved = saved["size_bytes"], saved["num_rows"]
        if path.stat().st_size < tar.size_bytes:
            raise ValueError(f"{path.name} is shorter than it was")
        os.truncate(_rows_path(path), saved["rows_bytes"])
        for line in _rows_path(path).read_text(encoding="utf-8").splitlines():
            item, *span = json.loads(line)
            tar.rows.append(IndexRow(item["key"].encode(), *span))
            tar.items.append(item)
        os.truncate(path, tar.size_bytes)
        with path.open("rb") as file:
            tar._sha256 = hashlib.file_digest(file, "sha256")
        if len(tar.rows) != tar._num_saved:
            raise ValueError(f"{_rows_path(path).name} has not the rows that it had")
        tar._file = path.open("ab", buffering=1 << 20)
        return tar

    def save(self) -> dict[str, int]:
        """Make all that was added durable; returns what `resumed` needs."""
        self._file.flush()
        os.fsync(self._file.fileno())
        new = zip(self.items[self._num_saved :], self.rows[self._num_saved :], strict=True)
        lines = [json.dumps([item, row.offset, row.size, row.crc32]) + "\n" for item, row in new]
        with _rows_path(self.path).open("ab" if self._num_saved else "wb") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            rows_bytes = file.tell()
        self._num_saved = len(self.rows)
        return {
            "size_bytes": self.size_bytes,
            "num_rows": len(self.rows),
            "rows_bytes": rows_bytes,
        }

    def add(self, key: str, members: Mapping[str, bytes], item: dict[str, Any]) -> None:
        start, crc, size = self.size_bytes, 0, 0
        for name, data in members.items():
            header = tarfile.TarInfo(f"{key}.{name}")
            header.size = len(data)
            padding = bytes(-size % BLOCK)  # of the member before; the sample's last has its own
            for part in (padding, header.tobuf(tarfile.GNU_FORMAT), data):
                self._write(part)
                crc = zlib.crc32(part, crc)
                size += len(part)
        self._write(bytes(-size % BLOCK))
        self.rows.append(IndexRow(key.encode(), start, size, crc))
        self.items.append(item)

    def finish(self) -> ShardFile:
        self._write(bytes(2 * BLOCK))  # the end mark
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index, content = self.path.with_suffix(".index.npy"), index_bytes(self.rows)
        write_synced(index, content)
        items, table = self.path.with_suffix(".items.parquet"), items_bytes(self.items)
        write_synced(items, table)
        return ShardFile(
            file=self.path.name,
            size_bytes=self.size_bytes,
            sha256=self._sha256.hexdigest(),
            num_samples=len(self.rows),
            index=index.name,
            index_sha256=hashlib.sha256(content).hexdigest(),
            items=items.name,
            items_sha256=hashlib.sha256(table).hexdigest(),
        )

    def abandon(self) -> None:
        # The flush of a full disk fails again; the folder is being removed anyway.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)


class ShardWriter:
    """Context manager: `write` samples, leave the block to publish the data set at `out`.

    Raises UserError when `out` exists (unless it is a data set and `overwrite`) or cannot be
    written; whatever goes wrong, nothing is left behind and what stood there stays as it was.
    With `work`, a folder beside `out`, that is where the set is made, and it stays when something
    goes wrong; `saved` is what `save` gave to go on from. Such a build can be too long to remember
    keys, so that they are unique is the caller's to know then.
    `parents` are the folders of sets that it is made from: what was erased from one of them, or
    from a set that it takes the place of, is refused, and their tombstones go on into it.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str,
        source: Mapping[str, Any],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        work: Path | None = None,
        saved: Mapping[str, Any] | None = None,
        parents: Sequence[Path] = (),
    ) -> None:
        self.out = out.absolute()
        self._name = name
        self._source = dict(source)
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._work, self._saved, self._parents = work, saved, tuple(parents)
        self._keys: set[str] = set()
        self._closed: list[Path] = []  # shards since the last save, and between the two before it
        self._unneeded: list[Path] = []
        self._tars: dict[str, _OpenTar] = {}
        self._finished: dict[str, list[ShardFile]] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._licences: dict[str, Counter[str]] = {}
        self._modalities: dict[str, Counter[str]] = {}

    def __enter__(self) -> Self:
        self._check_target()
        self.tombstones = tombstones_of(dict.fromkeys([*self._parents, self.out]))
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self._work is None:
                prefix = f".{self.out.name}.partial-"
                self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out.parent))
                self._folder.chmod(0o755)
            else:
                self._folder = self._work
                self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        if self._work is not None:
            self._resume(self._saved or {})
        return self

    def save(self) -> dict[str, Any]:
        """Make all that was written durable; returns what a writer goes on from, for JSON.

        Raises UserError for a failing disk.
        """
        try:
            saved = {
                split: {
                    "finished": [asdict(shard) for shard in self._finished[split]],
                    "open": self._tars[split].save() if split in self._tars else None,
                    "languages": dict(self._languages[split]),
                    "licences": dict(self._licences[split]),
                    "modalities": dict(self._modalities[split]),
                }
                for split in self._finished
            }
            sync_folder(self._folder)
            for tar in self._unneeded:  # closed before the last save, so no save refers to them
                _rows_path(tar).unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        self._unneeded, self._closed = self._closed, []
        return saved

    def _resume(self, saved: Mapping[str, Any]) -> None:
        try:
            self._reopen(saved)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the unfinished shards in {self._folder} are damaged: {error}. Begin anew with "
                "--restart."
            ) from None

    def _reopen(self, saved: Mapping[str, Any]) -> None:
        kept: set[str] = set()
        for split, of_split in saved.items():
            shards = [ShardFile(**shard) for shard in of_split["finished"]]
            self._finished[split] = shards
            self._languages[split] = Counter(of_split["languages"])
            self._licences[split] = Counter(of_split["licences"])
            self._modalities[split] = Counter(of_split["modalities"])
            kept.update(name for shard in shards for name in shard.names)
            for shard in shards:
                if (self._folder / shard.file).stat().st_size != shard.size_bytes:
                    raise ValueError(f"{shard.file} is not as long as it was")
            if of_split["open"] is not None:
                path = self._folder / _shard_name(split, len(shards))
                self._tars[split] = _OpenTar.resumed(path, of_split["open"])
                kept.add(path.name)
        for file in self._folder.iterdir():
            if file.name not in kept:  # written after the save
                file.unlink()

    def write(
        self,
        key: str,
        members: Mapping[str, bytes],
        meta: Mapping[str, Any],
        *,
        split: str = "train",
    ) -> None:
        """Append one sample to a split; its captions are cleaned by the rule of samples.py.

        `members` are media by the names they have after the key: `jpg`, or with labels
        `frames.jpg`, `spoken-es.ogg`. `meta` becomes the JSON after them.
        Raises SampleError when the sample cannot be stored (the set goes on without it), UserError
        for a duplicate key or a failing disk (the set is given up).
        """
        for name in members:
            if not _MEMBER_NAME.fullmatch(name) or modality_of(name) is None:
                raise SampleError(key, f"the member {name!r} is no medium; {_MEMBER_RULE}")
        if not safe_name(key) or "." in key or len(key.encode()) > MAX_KEY_BYTES:
            rule = f"printable, at most {MAX_KEY_BYTES} bytes, without dots and leading slashes"
            raise SampleError(key, f"the key must be {rule}")
        if not split.isidentifier():
            raise UserError(f"the split name {split!r} must be letters, digits and underscores")
        if key in self._keys:
            raise UserError(f"the key {key!r} occurs twice. Keys are unique over all splits.")
        refusal = self.tombstones.refusal_of(key, members)
        if refusal is not None:
            raise SampleError(key, refusal)
        stored = dict(meta)
        try:
            for field in ("captions", "transcripts"):
                if field in stored:
                    stored[field] = clean_captions(stored[field], field)
            text = json.dumps(stored, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            encoded = text.encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise SampleError(key, str(error)) from None
        try:
            self._append(split, key, members, stored, encoded)
        except OSError as error:
            raise self._cannot_write(error) from None
        self._count(split, members, stored)
        if self._work is None:
            self._keys.add(key)

    def describe(self, **more: Any) -> None:
        """Add to `source` what is known only while the set is being built."""
        self._source.update(more)

    def attach(self, file: str, content: bytes | Path) -> None:
        """Put a further file beside the shards, its bytes or a copy of a file of any size.

        Raises UserError for a failing disk.
        """
        try:
            if isinstance(content, Path):
                shutil.copyfile(content, self._folder / file)
                with open(self._folder / file, "rb") as copy:
                    os.fsync(copy.fileno())
            else:
                write_synced(self._folder / file, content)
        except OSError as error:
            raise self._cannot_write(error) from None

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error_type is None:
                self._publish()
        except OSError as failure:
            raise self._cannot_write(failure) from None
        finally:
            for tar in self._tars.values():
                tar.abandon()
            if self._work is None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _append(
        self,
        split: str,
        key: str,
        members: Mapping[str, bytes],
        meta: Mapping[str, Any],
        encoded: bytes,
    ) -> None:
        tar = self._tars.get(split)
        item = item_row(key, members, meta, len(encoded))
        if tar is not None and tar.size_bytes + item["size_bytes"] > self._max_shard_bytes:
            self._finish(split)
            tar = None
        if tar is None:
            number = len(self._finished.setdefault(split, []))
            tar = self._tars[split] = _OpenTar(self._folder / _shard_name(split, number))
        tar.add(key, {**members, "json": encoded}, item)

    def _finish(self, split: str) -> None:
        self._finished[split].append(self._tars[split].finish())
        self._closed.append(self._tars[split].path)
        del self._tars[split]

    def _count(self, split: str, members: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
        languages = self._languages.setdefault(split, Counter())
        for field in ("captions", "transcripts"):
            for language, texts in meta.get(field, {}).items():
                languages[language] += len(texts)
        modalities = modalities_of(members, meta)
        self._modalities.setdefault(split, Counter()).update(modalities)
        licence = str(meta.get("licence") or "unstated")
        self._licences.setdefault(split, Counter())[licence] += 1

    def _publish(self) -> None:
        if not self._finished:
            raise UserError(f"no sample was written, so {self.out} was not made")
        for split in list(self._tars):
            self._finish(split)
        splits = {
            name: SplitFiles(
                shards=tuple(shards),
                languages=self._languages[name],
                licences=self._licences[name],
                modalities=self._modalities[name],
            )
            for name, shards in self._finished.items()
        }
        manifest = Manifest(name=self._name, splits=splits, source=self._source)
        write_synced(self._folder / MANIFEST_NAME, manifest_bytes(manifest))
        erased = self._folder / TOMBSTONES_NAME  # there already of an erasure
        if self.tombstones.erasures and not erased.exists():
            write_synced(erased, self.tombstones.content())
        self._check_target()
        publish_folder(self._folder, self.out)

    def _check_target(self) -> None:
        check_target(self.out, "data set", is_data_set, overwrite=self._overwrite)

    def _cannot_write(self, error: OSError) -> UserError:
        reason = error.strerror or str(error)
        left = "Nothing was left behind" if self._work is None else f"{self._work} is kept"
        return UserError(
            f"the data set {self.out} cannot be written: {reason}. {left}; "
            "free some space or choose a folder that can be written."
        )


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def _rows_path(tar: Path) -> Path:
    return tar.parent.parent / f"{tar.stem}.rows.jsonl"


def is_data_set(folder: Path) -> bool:
    """Whether it is a data set of ours, whole or damaged."""
    return json_of(folder / MANIFEST_NAME).get("format") == FORMAT


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

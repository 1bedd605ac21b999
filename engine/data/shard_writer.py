"""Writes a data set: everything into a temporary sibling folder, synced, then one rename.

Until the rename nothing stands under the final name, so a killed or failed write is never taken
for a whole set. The bytes follow from the samples and their order alone (no times, no owners):
the same input gives the same fingerprint. A shard is closed once it passes `max_shard_bytes`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from carillon.engine.config import UserError
from carillon.engine.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    ShardFile,
    SplitFiles,
    manifest_bytes,
)
from carillon.engine.data.publish import check_target, json_of, publish_folder
from carillon.engine.data.samples import SampleError, clean_captions
from carillon.engine.data.shard_index import (
    JSON_META,
    MAX_KEY_BYTES,
    MEDIA_EXTENSIONS,
    IndexRow,
    index_bytes,
    safe_name,
)
from carillon.engine.data.tar_members import BLOCK

DEFAULT_SHARD_BYTES = 256 << 20


class _OpenTar:
    """One shard under construction; its SHA-256 runs along with the writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[IndexRow] = []
        self.size_bytes = 0
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()

    def add(self, key: str, media: bytes, extension: str, meta: bytes) -> None:
        media_offset = self._member(f"{key}.{extension}", media)
        meta_offset = self._member(f"{key}.json", meta)
        crc = zlib.crc32(meta, zlib.crc32(media))
        row = (key.encode(), media_offset, len(media), meta_offset, len(meta), crc, JSON_META)
        self.rows.append(IndexRow(*row))

    def finish(self) -> ShardFile:
        self._write(bytes(2 * BLOCK))  # the end mark
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index, content = self.path.with_suffix(".index.npy"), index_bytes(self.rows)
        write_synced(index, content)
        return ShardFile(
            file=self.path.name,
            size_bytes=self.size_bytes,
            sha256=self._sha256.hexdigest(),
            num_samples=len(self.rows),
            index=index.name,
            index_sha256=hashlib.sha256(content).hexdigest(),
        )

    def abandon(self) -> None:
        # The flush of a full disk fails again; the folder is being removed anyway.
        with contextlib.suppress(OSError):
            self._file.close()

    def _member(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.GNU_FORMAT))
        offset = self.size_bytes
        self._write(data + bytes(-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)


class ShardWriter:
    """Context manager: `write` samples, leave the block to publish the data set at `out`.

    Raises UserError when `out` exists (unless it is a data set and `overwrite`) or cannot be
    written; whatever goes wrong, nothing is left behind and what stood there stays as it was.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str,
        source: Mapping[str, Any],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.out = out.absolute()
        self._name = name
        self._source = dict(source)
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._keys: set[str] = set()
        self._tars: dict[str, _OpenTar] = {}
        self._finished: dict[str, list[ShardFile]] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._licences: dict[str, Counter[str]] = {}

    def __enter__(self) -> Self:
        self._check_target()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{self.out.name}.partial-"
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out.parent))
            self._folder.chmod(0o755)
        except OSError as error:
            raise self._cannot_write(error) from None
        return self

    def write(
        self,
        key: str,
        media: bytes,
        extension: str,
        meta: Mapping[str, Any],
        *,
        split: str = "train",
    ) -> None:
        """Append one sample to a split; its captions are cleaned by the rule of samples.py.

        Raises SampleError when the sample cannot be stored (the set goes on without it), UserError
        for a duplicate key or a failing disk (the set is given up).
        """
        if extension not in MEDIA_EXTENSIONS:
            raise SampleError(key, f"extension {extension!r} is none of {MEDIA_EXTENSIONS}")
        if not safe_name(key) or "." in key or len(key.encode()) > MAX_KEY_BYTES:
            rule = f"printable, at most {MAX_KEY_BYTES} bytes, without dots and leading slashes"
            raise SampleError(key, f"the key must be {rule}")
        if not split.isidentifier():
            raise UserError(f"the split name {split!r} must be letters, digits and underscores")
        if key in self._keys:
            raise UserError(f"the key {key!r} occurs twice. Keys are unique over all splits.")
        stored = dict(meta)
        try:
            if "captions" in stored:
                stored["captions"] = clean_captions(stored["captions"])
            text = json.dumps(stored, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            encoded = text.encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise SampleError(key, str(error)) from None
        try:
            self._append(split, key, media, extension, encoded)
        except OSError as error:
            raise self._cannot_write(error) from None
        self._count(split, stored)
        self._keys.add(key)

    def attach(self, file: str, data: bytes) -> None:
        """Put a further file beside the shards. Raises UserError for a failing disk."""
        try:
            write_synced(self._folder / file, data)
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
            shutil.rmtree(self._folder, ignore_errors=True)

    def _append(self, split: str, key: str, media: bytes, extension: str, meta: bytes) -> None:
        tar = self._tars.get(split)
        if tar is not None and tar.size_bytes + len(media) + len(meta) > self._max_shard_bytes:
            self._finish(split)
            tar = None
        if tar is None:
            number = len(self._finished.setdefault(split, []))
            tar = self._tars[split] = _OpenTar(self._folder / f"{split}-{number:06d}.tar")
        tar.add(key, media, extension, meta)

    def _finish(self, split: str) -> None:
        self._finished[split].append(self._tars[split].finish())
        del self._tars[split]

    def _count(self, split: str, meta: Mapping[str, Any]) -> None:
        languages = self._languages.setdefault(split, Counter())
        for language, texts in meta.get("captions", {}).items():
            languages[language] += len(texts)
        licence = str(meta.get("licence") or "unstated")
        self._licences.setdefault(split, Counter())[licence] += 1

    def _publish(self) -> None:
        if not self._keys:
            raise UserError(f"no sample was written, so {self.out} was not made")
        for split in list(self._tars):
            self._finish(split)
        splits = {
            name: SplitFiles(
                shards=tuple(shards),
                languages=self._languages[name],
                licences=self._licences[name],
            )
            for name, shards in self._finished.items()
        }
        manifest = Manifest(name=self._name, splits=splits, source=self._source)
        write_synced(self._folder / MANIFEST_NAME, manifest_bytes(manifest))
        self._check_target()
        publish_folder(self._folder, self.out)

    def _check_target(self) -> None:
        check_target(self.out, "data set", _is_data_set, overwrite=self._overwrite)

    def _cannot_write(self, error: OSError) -> UserError:
        reason = error.strerror or str(error)
        return UserError(
            f"the data set {self.out} cannot be written: {reason}. Nothing was left behind; "
            "free some space or choose a folder that can be written."
        )


def _is_data_set(folder: Path) -> bool:
    """Whether it is a data set of ours, whole or damaged."""
    return json_of(folder / MANIFEST_NAME).get("format") == FORMAT


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""The index of one tar shard: a numpy row per sample with byte offsets, sizes and a CRC-32.

With it a sample is one positioned read, whatever the shard's size. Rows are stored as `.npy`
without pickles, checked whole once, then read one by one. `index_tar` builds the rows of a foreign
WebDataset shard: consecutive members that share the name up to the first dot are one sample.
Members whose name leaves the folder, links, pickles and code are ignored and counted, never opened.
The CRC finds damage, not forgery; the manifest's SHA-256 stands for the whole file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from carillon.engine.config import UserError
from carillon.engine.data.tar_members import TarError, TarMember, iter_members

NO_META, JSON_META, TEXT_META = 0, 1, 2
MAX_KEY_BYTES = 200
# Order of preference when a sample has several media members.
MEDIA_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    *("flac", "wav", "mp3", "ogg", "opus"),
    *("mp4", "webm", "mkv"),
)
_META_EXTENSIONS = ("json", "txt")


class IndexRow(NamedTuple):
    """Where one sample lies in its shard; the CRC-32 runs over media, then meta."""

    key: bytes
    media_offset: int
    media_size: int
    meta_offset: int
    meta_size: int
    crc32: int
    meta_kind: int


class IndexedTar(NamedTuple):
    """What `index_tar` found in one shard."""

    rows: list[IndexRow]
    ignored: Counter[str]
    sha256: str
    size_bytes: int


def rows_to_array(rows: Sequence[IndexRow]) -> np.ndarray[Any, Any]:
    """Pack rows into the structured array that is stored."""
    width = max((len(row.key) for row in rows), default=1)
    return np.array([tuple(row) for row in rows], dtype=_row_dtype(width))


def _row_dtype(key_width: int) -> np.dtype[Any]:
    dtype = [("key", f"S{key_width}"), ("media_offset", "<u8"), ("media_size", "<u4")]
    dtype += [("meta_offset", "<u8"), ("meta_size", "<u4"), ("crc32", "<u4"), ("meta_kind", "u1")]
    return np.dtype(dtype)


class RowLayout:
    """Where the rows of a checked index lie in its file; reads one by a positioned read."""

    def __init__(self, offset: int, num_rows: int, key_width: int) -> None:
        self.num_rows = num_rows
        self._offset = offset
        self._packed = struct.Struct(f"<{key_width}sQIQIIB")

    def read(self, fd: int, number: int) -> IndexRow:
        """Row `number` of the index open as `fd`. Raises OSError when the file has shrunk."""
        data = os.pread(fd, self._packed.size, self._offset + number * self._packed.size)
        if len(data) < self._packed.size:
            raise OSError(errno.EIO, "its index is cut short")
        key, *rest = self._packed.unpack(data)
        return IndexRow(key.rstrip(b"\0"), *rest)


def check_index(path: Path, content: bytes, *, shard_size_bytes: int) -> RowLayout:
    """Check that the content of an index file is one and stays inside its shard.

    Raises UserError when it is not an index, holds pickles, or points outside the shard.
    """
    try:
        rows = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the index {path} cannot be read: {error}") from None
    names = rows.dtype.names == IndexRow._fields
    if rows.ndim != 1 or not names or rows.dtype != _row_dtype(rows.dtype["key"].itemsize):
        raise UserError(f"the index {path} is not a shard index")
    for part in ("media", "meta"):
        ends = rows[f"{part}_offset"] + rows[f"{part}_size"].astype(np.uint64)
        if len(rows) and (
            int(ends.max()) > shard_size_bytes
            or int(rows[f"{part}_offset"].max()) > shard_size_bytes
        ):
            raise UserError(f"the index {path} points past the end of its shard")
    return RowLayout(len(content) - rows.nbytes, len(rows), rows.dtype["key"].itemsize)


def index_tar(path: Path) -> IndexedTar:
    """Scan a WebDataset shard. Raises UserError naming the file when it is damaged."""
    ignored: Counter[str] = Counter()
    rows: list[IndexRow] = []
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            group: dict[str, TarMember] = {}
            group_key = ""
            for member in iter_members(file, size_bytes):
                split = _usable(member, ignored)
                if split is None:
                    continue
                if split[0] != group_key:
                    rows += _row(file.fileno(), group_key, group, ignored)
                    group_key, group = split[0], {}
                group.setdefault(split[1], member)
            rows += _row(file.fileno(), group_key, group, ignored)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except TarError as error:
        raise UserError(f"{path} cannot be used: {error}. Copy or build it again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return IndexedTar(rows, ignored, sha256, size_bytes)


def _usable(member: TarMember, ignored: Counter[str]) -> tuple[str, str] | None:
    """Split a member's name into key and extension; None, counted, for what is not read."""
    if member.kind == "directory":
        return None
    if member.kind != "file":
        ignored["link or special file"] += 1
        return None
    folder, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    if not safe_name(member.name) or not stem or len(key.encode()) > MAX_KEY_BYTES:
        ignored["unsafe name"] += 1
        return None
    extension = extension.lower()
    if extension not in MEDIA_EXTENSIONS and extension not in _META_EXTENSIONS:
        ignored[f".{extension[:32]}"] += 1
        return None
    return key, extension


def safe_name(name: str) -> bool:
    """Whether a member's name stays below its folder and is printable UTF-8."""
    return bool(
        name
        and name.isprintable()
        and not name.startswith("/")
        and "\\" not in name
        and name[1:2] != ":"
        and all(part not in ("", ".", "..") for part in name.removeprefix("./").split("/"))
    )


def _row(
    fd: int, key: str, group: dict[str, TarMember], ignored: Counter[str]
) -> Iterable[IndexRow]:
    if not group:
        return []
    media = next((group[ext] for ext in MEDIA_EXTENSIONS if ext in group), None)
    if media is None:
        ignored["sample without media"] += 1
        return []
    meta = group.get("json") or group.get("txt")
    kind = JSON_META if "json" in group else TEXT_META if meta else NO_META
    meta_offset, meta_size = (meta.offset, meta.size) if meta else (media.offset, 0)
    if max(media.size, meta_size) >= 1 << 32:
        ignored["sample above 4 GiB"] += 1
        return []
    crc = zlib.crc32(os.pread(fd, media.size, media.offset))
    crc = zlib.crc32(os.pread(fd, meta_size, meta_offset), crc)
    name = key.removeprefix("./").encode()
    return [IndexRow(name, media.offset, media.size, meta_offset, meta_size, crc, kind)]

"""The index of one tar shard: a row per sample with byte offsets, sizes and CRC-32s.

With it a sample is one positioned read, whatever the shard's size. An index is an `.npy` file for
whoever wants to look into it; here nothing is parsed. Its header follows from the number of rows
and the file's size and must be that to the byte; each row ends with a CRC-32 of itself, checked
when the row is read. So opening and reading are O(1), whatever the number of rows, and a flipped
bit anywhere is found before what it says is used. The CRCs find damage, not forgery; the manifest's
SHA-256 stands for the whole file.
`index_tar` builds the rows of a foreign WebDataset shard: consecutive members that share the name
up to the first dot are one sample. Members whose name leaves the folder, links, pickles and code
are ignored and counted, never opened.
A sample's text is its .json, or its .txt where there is no .json. Where there are both, the .txt
counts only if the .json holds no caption (img2dataset writes such); its other keys are not read
then, since a row has room for one of the two. A .json that is no JSON object counts, so that
reading the sample tells what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from carillon.engine.access import explained
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
_HEADER_BYTES = 320  # the same for every index: the longest key and number of rows fit
_CRC_BYTES = 4  # row_crc32, over the bytes of the row before it
_FIELDS = [("media_offset", "<u8"), ("media_size", "<u4"), ("meta_offset", "<u8")]
_FIELDS += [("meta_size", "<u4"), ("crc32", "<u4"), ("meta_kind", "|u1"), ("row_crc32", "<u4")]


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


def index_bytes(rows: Sequence[IndexRow]) -> bytes:
    """The content of an index file."""
    key_width = max((len(row.key) for row in rows), default=1)
    packed = _packed(key_width)
    content = bytearray(index_header(key_width, len(rows)))
    for row in rows:
        data = packed.pack(*row)
        content += data + zlib.crc32(data).to_bytes(_CRC_BYTES, "little")
    return bytes(content)


def index_header(key_width: int, num_rows: int) -> bytes:
    """The header of an index file: version 1.0 of numpy's format, padded to one length."""
    descr = [("key", f"|S{key_width}"), *_FIELDS]
    text = repr({"descr": descr, "fortran_order": False, "shape": (num_rows,)}).encode()
    prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return prefix + text.ljust(_HEADER_BYTES - 11) + b"\n"


def _packed(key_width: int) -> struct.Struct:
    """A row but for its own CRC."""
    return struct.Struct(f"<{key_width}sQIQIIB")


class IndexReader:
    """An open index; reads a row by one positioned read and checks it before it is used.

    Raises UserError naming the file: at once when it cannot be opened or is no index of `num_rows`
    rows, at a row that is damaged or points outside its shard.
    """

    def __init__(self, path: Path, *, num_rows: int, shard_size_bytes: int) -> None:
        self._path, self._shard_size_bytes = path, shard_size_bytes
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"the index {path} cannot be read: {explained(error)}") from None
        self._packed = _packed(self._key_width(num_rows))

    def row(self, number: int) -> IndexRow:
        size = self._packed.size
        data = self._read(size + _CRC_BYTES, _HEADER_BYTES + number * (size + _CRC_BYTES))
        if zlib.crc32(data[:size]).to_bytes(_CRC_BYTES, "little") != data[size:]:
            raise self._refused(f"does not match its checksum at row {number:,}")
        key, *rest = self._packed.unpack_from(data)
        row = IndexRow(key.rstrip(b"\0"), *rest)
        ends = row.media_offset + row.media_size, row.meta_offset + row.meta_size
        if max(ends) > self._shard_size_bytes:
            raise self._refused(f"points past the end of its shard at row {number:,}")
        return row

    def _key_width(self, num_rows: int) -> int:
        """The width that follows from the file's size, once the header is found to say the same."""
        rows_bytes = os.fstat(self._fd).st_size - _HEADER_BYTES
        row_bytes, rest = divmod(rows_bytes, max(num_rows, 1))
        key_width = row_bytes - _packed(0).size - _CRC_BYTES
        if rest or not 1 <= key_width <= MAX_KEY_BYTES:
            raise self._refused(f"is truncated or altered: it does not hold {num_rows:,} rows")
        if self._read(_HEADER_BYTES, 0) != index_header(key_width, num_rows):
            raise self._refused(
                f"does not match its checksum: its header is not of {num_rows:,} rows"
            )
        return key_width

    def _read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise UserError(f"the index {self._path} cannot be read: {explained(error)}") from None

    def _refused(self, reason: str) -> UserError:
        return UserError(f"the index {self._path} {reason}. Copy or build the set again.")

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


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
    meta, kind = _meta_of(fd, group)
    meta_offset, meta_size = (meta.offset, meta.size) if meta else (media.offset, 0)
    if max(media.size, meta_size) >= 1 << 32:
        ignored["sample above 4 GiB"] += 1
        return []
    crc = zlib.crc32(os.pread(fd, media.size, media.offset))
    crc = zlib.crc32(os.pread(fd, meta_size, meta_offset), crc)
    name = key.removeprefix("./").encode()
    return [IndexRow(name, media.offset, media.size, meta_offset, meta_size, crc, kind)]


def _meta_of(fd: int, group: dict[str, TarMember]) -> tuple[TarMember | None, int]:
    """The member that is the sample's text by the rule above, and its kind."""
    described, text = group.get("json"), group.get("txt")
    if described and not (text and _lacks_captions(fd, described)):
        return described, JSON_META
    return text, TEXT_META if text else NO_META


def _lacks_captions(fd: int, member: TarMember) -> bool:
    if member.size >= 1 << 32:
        return False
    try:
        meta = json.loads(os.pread(fd, member.size, member.offset))
    except (ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and not meta.get("captions") and not meta.get("caption")

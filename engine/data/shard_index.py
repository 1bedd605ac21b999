"""The index of one tar shard: a row per sample with the span of bytes that holds its members.

With it a sample is one positioned read, whatever the shard's size and however many members it has:
they stand one after another, and the tar headers between them say which is which.
An index is an `.npy` file for whoever wants to look into it; here nothing is parsed. Its header
follows from the number of rows and the file's size and must be that to the byte; each row ends with
a CRC-32 of itself, checked when the row is read. So opening and reading are O(1), whatever the
number of rows, and a flipped bit anywhere is found before what it says is used. The CRCs find
damage, not forgery; the manifest's SHA-256 stands for the whole file.
`index_tar` builds the rows of a foreign WebDataset shard: consecutive members that share the name
up to the first dot are one sample. Members whose name leaves the folder, links, pickles and code
are ignored and counted, never opened.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.hashed_file import HashedFile
from carillon.engine.data.samples import modality_of
from carillon.engine.data.store import open_blob
from carillon.engine.data.tar_members import TarError, TarMember, iter_members

MAX_KEY_BYTES = 200
TEXT_MEMBERS = ("json", "txt")
_MAX_SPAN_BYTES = 1 << 32
_CHUNK_BYTES = 1 << 24
_HEADER_BYTES = 320  # the same for every index: the longest key and number of rows fit
_CRC_BYTES = 4  # row_crc32, over the bytes of the row before it
_FIELDS = [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("row_crc32", "<u4")]


class IndexRow(NamedTuple):
    """Where one sample lies in its shard: from the first header to the last byte of its last
    member. The CRC-32 is of those bytes."""

    key: bytes
    offset: int
    size: int
    crc32: int


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
    return struct.Struct(f"<{key_width}sQII")


class IndexReader:
    """An open index; reads a row by one positioned read and checks it before it is used.

    Raises UserError naming the file: at once when it cannot be opened or is no index of `num_rows`
    rows, at a row that is damaged or points outside its shard.
    """

    def __init__(self, place: str | Path, *, num_rows: int, shard_size_bytes: int) -> None:
        self._place, self._shard_size_bytes = place, shard_size_bytes
        try:
            self._blob = open_blob(str(place))
        except OSError as error:
            raise UserError(f"the index {place} cannot be read: {explained(error)}") from None
        self._packed = _packed(self._key_width(num_rows))

    def row(self, number: int) -> IndexRow:
        size = self._packed.size
        data = self._read(size + _CRC_BYTES, _HEADER_BYTES + number * (size + _CRC_BYTES))
        if zlib.crc32(data[:size]).to_bytes(_CRC_BYTES, "little") != data[size:]:
            raise self._refused(f"does not match its checksum at row {number:,}")
        key, *rest = self._packed.unpack_from(data)
        row = IndexRow(key.rstrip(b"\0"), *rest)
        if row.offset + row.size > self._shard_size_bytes:
            raise self._refused(f"points past the end of its shard at row {number:,}")
        return row

    def _key_width(self, num_rows: int) -> int:
        """The width that follows from the file's size, once the header is found to say the same."""
        rows_bytes = self._blob.size_bytes - _HEADER_BYTES
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
            return self._blob.read(offset, size)
        except OSError as error:
            raise UserError(f"the index {self._place} cannot be read: {explained(error)}") from None

    def _refused(self, reason: str) -> UserError:
        return UserError(f"the index {self._place} {reason}. Copy or build the set again.")


def index_tar(place: str | Path) -> IndexedTar:
    """Scan a WebDataset shard, reading it once. Raises UserError naming it when it is damaged."""
    ignored: Counter[str] = Counter()
    rows: list[IndexRow] = []
    try:
        file = HashedFile(open_blob(str(place)))
        usable = (
            (split[0], member)
            for member in iter_members(file, file.size_bytes)
            if (split := _usable(member, ignored)) is not None
        )
        for key, members in groupby(usable, key=itemgetter(0)):
            rows += _row(file, key, [member for _, member in members], ignored)
        sha256 = file.sha256()
    except TarError as error:
        raise UserError(f"{place} cannot be used: {error}. Copy or build it again.") from None
    except OSError as error:
        raise UserError(f"{place} cannot be read: {explained(error)}") from None
    return IndexedTar(rows, ignored, sha256, file.size_bytes)


def members_of(key: str, span: bytes) -> dict[str, bytes]:
    """The members of a sample in the bytes of its span, by their names after the key.

    Of two with one name the first counts. Raises TarError when the bytes are no part of a tar.
    """
    members: dict[str, bytes] = {}
    for member in iter_members(io.BytesIO(span), len(span), part=True):
        split = _usable(member, Counter())
        if split is not None and split[0].removeprefix("./") == key:
            members.setdefault(split[1], span[member.offset : member.offset + member.size])
    return members


def _usable(member: TarMember, ignored: Counter[str]) -> tuple[str, str] | None:
    """Split a member's name into key and member name; None, counted, for what is not read."""
    if member.kind == "directory":
        return None
    if member.kind != "file":
        ignored["link or special file"] += 1
        return None
    folder, _, base = member.name.rpartition("/")
    stem, _, name = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    if not safe_name(member.name) or not stem or len(key.encode()) > MAX_KEY_BYTES:
        ignored["unsafe name"] += 1
        return None
    name = name.lower()
    if name not in TEXT_MEMBERS and modality_of(name) is None:
        ignored[f".{name[:32]}"] += 1
        return None
    return key, name


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
    file: HashedFile, key: str, members: Sequence[TarMember], ignored: Counter[str]
) -> Iterable[IndexRow]:
    start, end = members[0].start, members[-1].offset + members[-1].size
    if end - start >= _MAX_SPAN_BYTES:
        ignored["sample above 4 GiB"] += 1
        return []
    crc = 0
    for offset in range(start, end, _CHUNK_BYTES):
        file.seek(offset)
        crc = zlib.crc32(file.read(min(_CHUNK_BYTES, end - offset)), crc)
    return [IndexRow(key.removeprefix("./").encode(), start, end - start, crc)]

"""A strict reader of tar headers: names, types, offsets; nothing is ever extracted.

Python 3.11's tarfile loops forever on a negative size and stops without a word at a damaged header
in the middle of an archive. This one checks every header's checksum, wants the end mark, and raises
with the byte where an archive stops making sense. It knows ustar, GNU long names and pax path and
size. The end mark is two zero blocks with nothing but zeros after them, at most as many as writers
pad with: more are a file that was preallocated or overwritten. A file that ends after one zero
block is taken, as GNU tar, bsdtar and tarfile do: it was complete up to there.
Left out: writing, compression, sparse members (reported as "other"), archives joined end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_MAX_END_BYTES = (2 + 20) * BLOCK  # the end mark, padded to records of the usual 20 blocks
_SCAN_BYTES = 1 << 20
_MAX_EXTENSION_BYTES = 1 << 20
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "directory", b"1": "link", b"2": "link"}


class TarError(ValueError):
    """The archive is truncated or damaged."""


class TarMember(NamedTuple):
    """`kind` is file, directory, link or other; `offset` is where its bytes start, `start` where
    its first header does."""

    name: str
    kind: str
    offset: int
    size: int
    start: int


def iter_members(file: BinaryIO, size_bytes: int, *, part: bool = False) -> Iterator[TarMember]:
    """Walk the members of an uncompressed tar of `size_bytes`; of a `part` of one, from a header to
    the last byte of a member, there is no end mark.

    Raises TarError at a truncated or damaged place.
    """
    position = start = 0
    name: str | None = None
    size: int | None = None
    while not part or position < size_bytes:
        block = _read(file, position, BLOCK, size_bytes)
        if not block.strip(b"\0"):
            _check_end(file, position)
            return
        header_name, kind_flag, header_size = _parse_header(block, position)
        offset = position + BLOCK
        member_size = header_size if size is None else size
        if offset + member_size > size_bytes:
            raise TarError(
                f"truncated: the member at byte {position:,} needs {member_size:,} bytes, "
                f"{size_bytes - offset:,} are there"
            )
        position = offset + -(-member_size // BLOCK) * BLOCK
        if kind_flag in (b"L", b"x", b"g", b"K"):
            body = _read_extension(file, offset, member_size, size_bytes)
            if kind_flag == b"L":
                name = _text(body.rstrip(b"\0"))
            elif kind_flag == b"x":
                name, size = _parse_pax(body, name, offset)
            continue
        kind = _KINDS.get(kind_flag, "other")
        yield TarMember(name or header_name, kind, offset, member_size, start)
        name = size = None
        start = position


def _read(file: BinaryIO, position: int, size: int, size_bytes: int) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) < size:
        raise TarError(f"truncated: it ends at byte {size_bytes:,} without an end mark")
    return data


def _check_end(file: BinaryIO, position: int) -> None:
    """Raise TarError unless the zeros from `position` on are an end mark."""
    file.seek(position)
    num_zeros = 0
    while data := file.read(_SCAN_BYTES):
        if rest := data.lstrip(b"\0"):
            num_zeros += len(data) - len(rest)
            raise TarError(
                f"damaged: {num_zeros:,} bytes of zeros at byte {position:,}, then other data"
            )
        num_zeros += len(data)
    if num_zeros > _MAX_END_BYTES:
        raise TarError(
            f"truncated or overwritten with zeros: it ends at byte {position:,}, "
            f"{num_zeros:,} bytes of zeros follow"
        )


def _read_extension(file: BinaryIO, offset: int, size: int, size_bytes: int) -> bytes:
    if size > _MAX_EXTENSION_BYTES:
        raise TarError(f"damaged: an extended header of {size:,} bytes at byte {offset:,}")
    return _read(file, offset, size, size_bytes)


def _parse_header(block: bytes, position: int) -> tuple[str, bytes, int]:
    stored = _number(block[148:156], position)
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise TarError(f"damaged: the header at byte {position:,} does not match its checksum")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _text(name), block[156:157], _number(block[124:136], position)


def _number(field: bytes, position: int) -> int:
    if field[0] == 0x80:  # GNU's base-256 form for sizes past 8 GiB
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise TarError(f"damaged: a number in the header at byte {position:,} cannot be read")
    return number


def _parse_pax(body: bytes, name: str | None, offset: int) -> tuple[str | None, int | None]:
    size: int | None = None
    try:
        while body:
            length = int(body.split(b" ", 1)[0])
            key, value = body[:length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
            if key == b"path":
                name = _text(value)
            elif key == b"size":
                size = int(value)
            if length <= 0 or (size is not None and size < 0):
                raise ValueError
            body = body[length:]
    except (ValueError, IndexError):
        raise TarError(f"damaged: the pax header at byte {offset:,} cannot be read") from None
    return name, size


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")

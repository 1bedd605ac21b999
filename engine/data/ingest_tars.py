"""Items of tar archives, local or remote: members are read by name and place, never extracted.

Consecutive members that share the name up to the first dot are one item, as in WebDataset. Links,
special files, names that leave the folder, pickles and whatever else is no medium and no text are
rejected by name and never opened. A damaged archive gives what stands before the damage, and one
rejection for the rest. Left out: compressed tars, which cannot be read by offset.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.ingest_items import (
    MEDIA_SUFFIXES,
    TEXT_SUFFIXES,
    Entry,
    Item,
    Rejected,
    Span,
    Text,
)
from carillon.engine.data.shard_index import safe_name
from carillon.engine.data.store import Blob, open_blob
from carillon.engine.data.tar_members import TarError, TarMember, iter_members

_READ_AHEAD_BYTES = 1 << 20


class _BlobFile(io.BytesIO):  # for its type alone: its own buffer stays empty
    """As much of a binary file as walking a tar's headers needs, a megabyte at a time."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob, self._position = blob, 0
        self._start, self._data = 0, b""

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        start = self._position - self._start
        if not 0 <= start <= start + size <= len(self._data):
            self._start, start = self._position, 0
            self._data = self._blob.read(self._position, max(size, _READ_AHEAD_BYTES))
        data = self._data[start : start + size]
        self._position += len(data)
        return data


def read_tar(place: str) -> Iterator[Entry]:
    """The items of a tar. Raises UserError when it cannot be read at all."""
    source = place.rpartition("/")[2]
    group: list[TarMember] = []
    damage: Rejected | None = None
    try:
        blob = open_blob(place)
        for member in iter_members(_BlobFile(blob), blob.size_bytes):
            if member.kind == "directory":
                continue
            if group and _stem(group[0]) != _stem(member):
                yield from _item(place, source, group)
                group = []
            group.append(member)
    except TarError as error:
        damage = Rejected(source=source, image="the rest of the archive", reason=str(error))
    except OSError as error:
        raise UserError(f"{place} cannot be read: {explained(error)}") from None
    yield from _item(place, source, group)
    if damage is not None:
        yield damage


def _stem(member: TarMember) -> str:
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _item(place: str, source: str, members: list[TarMember]) -> Iterator[Entry]:
    if not members:
        return
    stem = _stem(members[0])
    item = Item(source=source, name=stem, members={})
    for member in members:
        name = member.name.removeprefix("./")[len(stem) + 1 :].lower()
        suffix = f".{name.rpartition('.')[2]}"
        refused = _refusal(member, suffix)
        if refused:
            shown = member.name.encode("utf-8", "backslashreplace").decode()
            yield Rejected(source=source, image=shown, reason=refused)
            continue
        where = Span(place, member.offset, member.size)
        if suffix in MEDIA_SUFFIXES:
            item.members.setdefault(name, where)
        else:
            language = name.rpartition(".")[0] or None
            item.texts.append(Text(suffix, None if suffix == ".json" else language, where))
    if item.members:
        item.texts.sort(key=lambda text: text.suffix)
        yield item
    elif item.texts:
        yield Rejected(source=source, image=stem, reason="a text without media")


def _refusal(member: TarMember, suffix: str) -> str | None:
    if member.kind != "file":
        return "a link or special file"
    if not safe_name(member.name):
        return "the name leaves the folder, or cannot be printed"
    if suffix not in MEDIA_SUFFIXES and suffix not in TEXT_SUFFIXES:
        return f"{suffix:.32} is no medium and no text"
    return None

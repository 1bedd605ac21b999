"""Items of a folder of media with their texts beside them, local or in an object store.

Subfolders are included, in the order of their names. A local file must lie inside the folder, links
resolved, unless `allow_outside`. Of a store, a folder's listing is in memory at a time: better many
folders than one of millions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.ingest_items import (
    MEDIA_SUFFIXES,
    Entry,
    Item,
    LocalFile,
    Rejected,
    Span,
    Text,
    Where,
    siblings,
)
from carillon.engine.data.store import is_remote, join, store_of


def read_folder(root: Path, *, allow_outside: bool) -> Iterator[Entry]:
    """The items of a local folder. Raises UserError when it cannot be read or holds no media."""
    found = False
    source = root.resolve().name
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders.sort()
        place = Path(folder).relative_to(root).as_posix()
        for entry in _entries(
            source, "" if place == "." else f"{place}/", files, root, allow_outside
        ):
            found = True
            yield entry
    if not found:
        raise _without_media(str(root))


def read_remote_folder(url: str) -> Iterator[Entry]:
    """The items of a folder in an object store. Raises UserError as above."""
    found = False
    source = url.rstrip("/").rpartition("/")[2]
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            listed = store_of(url).list(join(url, folder.rstrip("/")) if folder else url)
        except OSError as error:
            raise UserError(f"{url} cannot be read: {error.strerror or error}") from None
        inner = sorted(name for name, facts in listed.items() if facts is None)
        pending += [f"{folder}{name}/" for name in reversed(inner)]
        files = [name for name, facts in listed.items() if facts is not None]
        for entry in _entries(source, folder, files, url, allow_outside=False):
            found = True
            yield entry
    if not found:
        raise _without_media(url)


def _entries(
    source: str, folder: str, files: list[str], root: Path | str, allow_outside: bool
) -> Iterator[Entry]:
    """The items of one folder; `folder` is empty or ends with a slash."""
    for name, texts in siblings(files):
        shown = folder + name
        try:
            suffix = name.rpartition(".")[2].lower()
            item = Item(
                source=source,
                name=shown,
                members={suffix: _where(root, shown, allow_outside)},
                texts=[
                    Text(kind, language, _where(root, folder + text, allow_outside))
                    for kind, language, text in texts
                ],
            )
            if not item.texts:
                stem = name.rpartition(".")[0]
                raise ValueError(f"no caption in {stem}.txt or {stem}.json beside it")
        except (ValueError, OSError) as error:
            yield Rejected(source=source, image=shown, reason=str(error))
        else:
            yield item


def _where(root: Path | str, name: str, allow_outside: bool) -> Where:
    if isinstance(root, str):
        return Span(join(root, name))
    return LocalFile(inside(root, name, allow_outside))


def inside(root: Path, name: str, allow_outside: bool) -> Path:
    """The regular file that `name` means. Raises ValueError if missing, outside or remote."""
    if is_remote(name):
        raise ValueError(f"{name.partition('://')[0]}:// is nothing that can be fetched")
    if "\0" in name:
        raise ValueError("the path holds a NUL byte")
    path = Path(os.path.realpath(root / name))  # resolve() raises for links in a circle
    if not allow_outside and not path.is_relative_to(root.resolve()):
        raise ValueError(f"the path leaves {root}; pass --allow-outside to permit that")
    if not path.is_file():
        raise ValueError("no such media file")
    return path


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {explained(error)}")


def _without_media(place: str) -> UserError:
    known = ", ".join(MEDIA_SUFFIXES)
    return UserError(f"{place} holds no picture, sound or video ({known}), subfolders included")

"""Reads a user's own pairs: a folder of pictures with captions beside them, or a table of paths.

Rows that name the same picture are one item with several captions. A picture must lie inside the
folder of its source, links resolved, unless `allow_outside`; a row that breaks a rule becomes a
`Rejected` and the next one is read. Columns are found by their usual names or named by the user;
`caption_de` is a German caption. Other columns are kept when they are plain values.
Left out: pictures behind URLs, archives, and tables too large for memory.
"""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.ingest_tables import TABLE_READERS, Row, RowReader
from carillon.engine.data.samples import UNKNOWN_LANGUAGE, parse_meta
from carillon.engine.data.store import is_remote

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"))
_IMAGE_NAMES = (
    *("image", "image_path", "path", "file", "file_name", "filename", "filepath", "picture"),
    *("img", "img_path", "image_file"),
)
_CAPTION_NAMES = ("captions", "caption", "text", "sentence", "description", "title")
_LANGUAGE_NAMES = ("language", "lang", "locale")
_CAPTION_WITH_LANGUAGE = re.compile(
    r"(?:captions?|text)[_.:-]([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})?)"
)
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8})*")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names as the user gave them; None or empty means: find them."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    language: str | None = None
    default_language: str = UNKNOWN_LANGUAGE


@dataclass(kw_only=True)
class Item:
    """One picture with its captions; the bytes are in `path` or, from some parquets, in `data`."""

    source: str
    image: str
    path: Path | None = None
    data: bytes | None = None
    captions: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What could not be taken, and why."""

    source: str
    image: str
    reason: str


def read_source(
    given: str, columns: Columns, *, allow_outside: bool = False
) -> Iterator[Item | Rejected]:
    """All items of one source in a fixed order.

    Raises UserError when the source as a whole cannot be read.
    """
    if is_remote(given):
        raise UserError(f"{given} is remote")
    path = Path(given)
    if path.is_dir():
        return _read_folder(path, columns.default_language, allow_outside)
    if not path.is_file():
        hint = " Patterns are the shell's: give the files without quotes." if "*" in given else ""
        raise UserError(f"{given} does not exist. Give a folder, csv, tsv, jsonl or parquet.{hint}")
    reader = TABLE_READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{given} cannot be ingested: {path.suffix or 'no suffix'} is none of "
            f"{', '.join(TABLE_READERS)}, and it is no folder."
        )
    return _read_table(path, reader, columns, allow_outside)


def _read_folder(root: Path, language: str, allow_outside: bool) -> Iterator[Item | Rejected]:
    found = False
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders.sort()
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix.lower() not in PICTURE_SUFFIXES:
                continue
            found = True
            image = path.relative_to(root).as_posix()
            item = Item(source=root.resolve().name, image=image)
            try:
                item.path = _inside(root, image, allow_outside)
                _read_neighbours(item, path, language, root, allow_outside)
            except (ValueError, OSError) as error:
                yield Rejected(source=item.source, image=image, reason=str(error))
            else:
                yield item
    if not found:
        raise UserError(
            f"{root} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}), subfolders included"
        )


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {explained(error)}")


def _read_neighbours(
    item: Item, path: Path, language: str, root: Path, allow_outside: bool
) -> None:
    """Captions from `stem.json` (a sample's JSON) or `stem.txt` (one caption a line)."""
    for suffix in (".json", ".txt"):
        neighbour = path.with_suffix(suffix)
        if item.captions or not neighbour.exists():
            continue
        data = _inside(root, neighbour.relative_to(root).as_posix(), allow_outside).read_bytes()
        if suffix == ".json":
            meta = parse_meta(data)
            item.captions = {
                language if code == UNKNOWN_LANGUAGE else code: texts
                for code, texts in meta.pop("captions").items()
            }
            item.extra = {"licence" if k == "license" else k: v for k, v in meta.items()}
        else:
            item.captions = {language: data.decode("utf-8-sig").splitlines()}
    if not item.captions:
        raise ValueError(f"no caption in {path.stem}.txt or {path.stem}.json beside it")


def _inside(root: Path, image: str, allow_outside: bool) -> Path:
    """The regular file that `image` means. Raises ValueError if missing, outside or remote."""
    if is_remote(image):
        raise ValueError("a remote picture; pictures behind URLs come with the data plane")
    if "\0" in image:
        raise ValueError("the path holds a NUL byte")
    path = Path(os.path.realpath(root / image))  # resolve() raises for links in a circle
    if not allow_outside and not path.is_relative_to(root.resolve()):
        raise ValueError(f"the path leaves {root}; pass --allow-outside to permit that")
    if not path.is_file():
        raise ValueError("no such picture file")
    return path


def _read_table(
    path: Path, reader: RowReader, columns: Columns, allow_outside: bool
) -> Iterator[Item | Rejected]:
    names, read_rows = reader(path)
    image_column, caption_columns, language_column = _find_columns(path, names, columns)
    known = {image_column, language_column, *caption_columns}
    items: dict[str, Item] = {}
    for number, row in enumerate(read_rows([name for name in known if name]), start=1):
        if isinstance(row, str):
            yield Rejected(source=path.name, image=f"row {number}", reason=row)
            continue
        image, data = _image_of(row.get(image_column), number)
        item = items.get(image)
        try:
            if not image:
                raise ValueError(f"the column {image_column!r} is empty")
            language = str(row.get(language_column or "") or columns.default_language).strip()
            captions = _captions_of(row, caption_columns, language)
            if item is None:
                item = Item(source=path.name, image=image, data=data, extra=_plain(row, known))
                if data is None:
                    item.path = _inside(path.parent, image, allow_outside)
                items[image] = item
        except (ValueError, OSError) as error:
            yield Rejected(source=path.name, image=image or f"row {number}", reason=str(error))
            continue
        for language, texts in captions.items():
            listed = item.captions.setdefault(language, [])
            listed += [text for text in texts if text not in listed]
    yield from items.values()


def _find_columns(
    path: Path, names: Sequence[str], columns: Columns
) -> tuple[str, dict[str, str | None], str | None]:
    """Image column, caption columns with the language each implies, language column."""
    given = [columns.image, columns.language, *(c.split("=", 1)[-1] for c in columns.captions)]
    for name in given:
        if name is not None and name not in names:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(names) or 'none'}")
    image = columns.image or next((name for name in _IMAGE_NAMES if name in names), None)
    captions: dict[str, str | None] = {}
    for given_name in columns.captions:
        stated, equals, name = given_name.rpartition("=")
        captions[name] = stated if equals else None
    if not captions:
        for name in names:
            if match := _CAPTION_WITH_LANGUAGE.fullmatch(name):
                captions[name] = match[1].replace("_", "-")
        plain = next((name for name in _CAPTION_NAMES if name in names and name != image), None)
        if plain is not None:
            captions[plain] = None
    if image is None or not captions:
        lacking = "--image-column" if image is None else "--caption-column"
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'none'}: none of them is known as a "
            f"{'picture path' if image is None else 'caption'}. Name it with {lacking}."
        )
    language = columns.language or next((n for n in _LANGUAGE_NAMES if n in names), None)
    return image, captions, language


def _image_of(value: object, number: int) -> tuple[str, bytes | None]:
    """The path, or a stand-in for it and the bytes, as parquets of other tools have them."""
    if isinstance(value, dict):
        data, name = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return str(name or f"row-{number}"), data
        value = name
    if isinstance(value, bytes):
        return f"row-{number}", value
    text = "" if value is None else str(value).strip()
    return posixpath.normpath(text) if text and "://" not in text else text, None


def check_language(code: object) -> None:
    """Raise ValueError unless `code` has the shape of a BCP 47 tag."""
    if not isinstance(code, str) or not _LANGUAGE.fullmatch(code):
        raise ValueError(f"{code!r} is no language code like en, pt-BR or zh-Hant")


def _captions_of(
    row: Row, caption_columns: Mapping[str, str | None], language: str
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for column, own_language in caption_columns.items():
        value = row.get(column)
        if value is None or value == "":
            continue
        by_language = value if isinstance(value, dict) else {own_language or language: value}
        for code, texts in by_language.items():
            if texts is None:
                continue
            check_language(code)
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the column {column!r} holds no text")
            found.setdefault(code, []).extend(texts)
    if not found:
        raise ValueError("no caption in this row")
    return found


def _plain(row: Row, known: set[str | None]) -> dict[str, Any]:
    """The other columns, as far as JSON holds them unchanged."""
    reserved = {*known, "captions", "source", "keywords"}
    kept: dict[str, Any] = {}
    for name, value in row.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if name not in reserved and isinstance(value, (str, int, float)) and finite and value != "":
            kept["licence" if name == "license" else name] = value
    return kept

"""Indexes of plain WebDataset tars, built once and kept in the user's cache folder.

The cache entry is named by a hash of the tars' places, sizes and modification times (of a remote
one: its tag), so an altered tar is indexed anew, and a second process that builds the same entry
loses nothing: the first rename wins. An entry is an ordinary dataset.json whose shards have
absolute paths or URLs.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from carillon.engine.config import UserError
from carillon.engine.data.block_cache import cache_root
from carillon.engine.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardFile,
    SplitFiles,
    manifest_bytes,
    read_manifest,
)
from carillon.engine.data.publish import publish_folder
from carillon.engine.data.shard_index import IndexedTar, index_bytes, index_tar
from carillon.engine.data.shard_writer import write_synced
from carillon.engine.data.store import Facts, StoreError, is_remote, join, listed, store_of

PLAIN_SPLIT = "all"
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_EXPANDED = 1_000_000
_FACTS_AT_A_TIME = 32  # requests to a store, one a tar
_log = logging.getLogger(__name__)


class Tar(NamedTuple):
    """A tar by its absolute path or URL, and what changes when its content does."""

    place: str
    version: str


def expand_sources(path: str | Path | Sequence[str]) -> list[Tar]:
    """Turn a folder, a .tar, a brace pattern or a list of those into existing tar files.

    Raises UserError for what does not exist or is no tar.
    """
    given = [str(path)] if isinstance(path, (str, Path)) else [str(item) for item in path]
    names = [
        name for item in given for name in itertools.islice(expand_braces(item), _MAX_EXPANDED)
    ]
    if any(is_remote(name) for name in names):
        with ThreadPoolExecutor(_FACTS_AT_A_TIME) as executor:
            tars = [tar for found in executor.map(_tars_by_name, names) for tar in found]
    else:
        tars = [tar for name in names for tar in _tars_by_name(name)]
    if not tars:
        raise UserError("no shard was given: an empty list of data paths")
    doubled = next((tar for tar, count in Counter(tars).items() if count > 1), None)
    if doubled:
        raise UserError(f"the shard {doubled.place} is given twice")
    return tars


def holds_manifest(folder: str) -> bool:
    """Whether a folder, by path or URL, is a data set. Raises UserError when a store fails."""
    if not is_remote(folder):
        return Path(folder, MANIFEST_NAME).is_file()
    if folder.endswith(".tar") or _BRACES.search(folder):
        return False
    try:
        store_of(folder).facts(join(folder, MANIFEST_NAME))
    except StoreError as error:
        if error.missing:
            return False
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return True


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand `x-{000..010}` and `{a,b}` as a shell would; zero padding is kept.

    Raises UserError for braces that are neither.
    """
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    body = match[1]
    first, dots, last = body.partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        width = len(first) if first.startswith("0") else 0
        choices: Iterator[str] = (f"{n:0{width}d}" for n in range(int(first), int(last) + 1))
    elif "," in body:
        choices = iter(body.split(","))
    else:
        raise UserError(f"{{{body}}} in {pattern} is no range like {{000..010}} or list {{a,b}}")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def indexed_manifest(tars: Sequence[Tar]) -> tuple[Path, Manifest]:
    """The cache folder and manifest of these tars, indexed now if they are new.

    Raises UserError for a damaged tar or a key that two samples share.
    """
    folder = cache_root() / "indexes" / _entry_name(tars)
    if (folder / MANIFEST_NAME).is_file():
        return folder, read_manifest(folder / MANIFEST_NAME, absolute_files=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        reason = f"{error.strerror}. Point XDG_CACHE_HOME to a folder that can be written."
        raise UserError(f"no index can be kept in {folder.parent}: {reason}") from None
    try:
        manifest = _build(tars, partial)
        if not folder.exists():
            publish_folder(partial, folder)
    except OSError as error:
        if not (folder / MANIFEST_NAME).is_file():  # else another process was first
            raise UserError(f"no index can be kept in {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder, manifest


def _tars_by_name(name: str) -> list[Tar]:
    return _remote_tars(name) if is_remote(name) else _tars_of(Path(name).absolute())


def _tars_of(path: Path) -> list[Tar]:
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{path} holds neither {MANIFEST_NAME} nor a .tar shard")
        return [_local_tar(tar) for tar in tars]
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give a data set folder or .tar shards.")
    if path.suffix != ".tar":
        raise UserError(f"{path} is no .tar shard (compressed tars cannot be read by offset)")
    return [_local_tar(path)]


def _local_tar(path: Path) -> Tar:
    stat = path.stat()
    return Tar(str(path), f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}")


def _remote_tars(url: str) -> list[Tar]:
    try:
        if url.endswith(".tar"):
            return [_remote_tar(url, store_of(url).facts(url))]
        tars = [
            _remote_tar(join(url, name), facts)
            for name, facts in listed(url)
            if name.endswith(".tar")
        ]
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}") from None
    if not tars:
        raise UserError(f"{url} holds neither {MANIFEST_NAME} nor a .tar shard")
    return tars


def _remote_tar(url: str, facts: Facts) -> Tar:
    return Tar(url, f"{url}\0{facts.size_bytes}\0{facts.tag}")


def _entry_name(tars: Sequence[Tar]) -> str:
    digest = hashlib.sha256(b"5\n")  # the version of what an entry holds
    for tar in tars:
        digest.update(f"{tar.version}\n".encode())
    return digest.hexdigest()[:32]


def _build(tars: Sequence[Tar], folder: Path) -> Manifest:
    shards: list[ShardFile] = []
    ignored: Counter[str] = Counter()
    owners: dict[bytes, str] = {}
    for number, (tar, _) in enumerate(tars):
        indexed = index_tar(tar)
        ignored.update(indexed.ignored)
        for row in indexed.rows:
            if row.key in owners:
                raise UserError(
                    f"the key {row.key.decode()!r} occurs in {_name(owners[row.key])} and again in "
                    f"{_name(tar)}. Keys are unique over all shards of a set."
                )
            owners[row.key] = tar
        shards.append(_write_index(folder / f"{number:06d}.index.npy", tar, indexed))
    if not owners:
        first = tars[0].place
        raise UserError(f"{first} holds no sample that can be read; ignored: {dict(ignored)}")
    parent = tars[0].place.rpartition("/")[0]
    if ignored:
        _log.warning("ignored members of %s: %s", parent, dict(ignored))
    manifest = Manifest(
        name=_name(parent),
        splits={PLAIN_SPLIT: SplitFiles(shards=tuple(shards))},
        source={"kind": "webdataset"},
        ignored=ignored,
    )
    write_synced(folder / MANIFEST_NAME, manifest_bytes(manifest))
    return manifest


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _write_index(path: Path, tar: str, indexed: IndexedTar) -> ShardFile:
    content = index_bytes(indexed.rows)
    write_synced(path, content)
    return ShardFile(
        file=tar,
        size_bytes=indexed.size_bytes,
        sha256=indexed.sha256,
        num_samples=len(indexed.rows),
        index=path.name,
        index_sha256=hashlib.sha256(content).hexdigest(),
    )

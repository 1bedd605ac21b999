"""Reads files by name and byte range, wherever they lie: a local path or a URL.

s3://, gs://, az:// and abfs:// are read by fsspec with s3fs, gcsfs or adlfs, whose own settings
(variables such as AWS_ENDPOINT_URL) hold; http:// and https:// by our fetcher, with the URL's own
host allowed. What fails and may pass is tried again, up to six times within two minutes, each try
under a deadline by its size. Remote bytes go through a cache of 1 MiB blocks on disk that all
processes share, named by the object's size and version tag: an object that changed is another one.
Connections belong to a process: after a fork the child makes its own.
Left out: writing, and other file systems of fsspec (local mounts are paths).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from carillon.engine.config import UserError
from carillon.engine.data.block_cache import BlockCache, cache_root
from carillon.engine.data.fetch import Fetcher, FetchError, FetchLimits
from carillon.engine.data.retry import RetryPolicy, with_retries

BLOCK_BYTES = 1 << 20
DEFAULT_CACHE_BYTES = 20 * 10**9
POLICY = RetryPolicy(max_tries=6, first_pause_s=0.5, longest_pause_s=15.0, deadline_s=120.0)

_REMOTE = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_TRY_S = 30.0  # of one request, and a second more for each of so many bytes:
_BYTES_PER_S = 1 << 20
_MAX_REQUEST_BYTES = 64 << 20


class StoreError(OSError):
    """A remote object cannot be read; `strerror` says why and what to do.

    `missing`: it is not there. `is_down`: the store as a whole fails, or wants other credentials.
    """

    def __init__(self, reason: str, *, missing: bool = False, is_down: bool = False) -> None:
        super().__init__(None, reason)
        self.missing, self.is_down = missing, is_down


class Facts(NamedTuple):
    """What a store says of an object: `tag` changes when its content does."""

    size_bytes: int
    tag: str


class Store(ABC):
    """The objects of one kind of URL. Raises StoreError."""

    @abstractmethod
    def facts(self, url: str) -> Facts:
        """Size and version of an object."""

    @abstractmethod
    def read(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), all of them."""

    @abstractmethod
    def list(self, url: str) -> dict[str, Facts | None]:
        """Names in a folder, each with its facts; None stands for a folder in it."""


class Blob(ABC):
    """One file for positioned reads; raises OSError as reading a local file does."""

    place: str
    size_bytes: int

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """The bytes there; fewer at the end of the file."""


class LocalBlob(Blob):
    """A local file; closed when the last reader lets go."""

    def __init__(self, path: str | Path) -> None:
        self.place = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class RemoteBlob(Blob):
    """A remote object, read by blocks through the cache."""

    def __init__(self, url: str, facts: Facts | None = None) -> None:
        self.place = url
        self.facts = facts or store_of(url).facts(url)
        self.size_bytes = self.facts.size_bytes
        self._name = f"{url}\0{self.facts.size_bytes}\0{self.facts.tag}"

    def read(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size_bytes)
        parts = [self._part(number, offset, stop) for number in _blocks(offset, stop)]
        lacking = [number for number, data in parts if data is None]
        fetched = self._fetch(lacking[0], lacking[-1]) if lacking else {}
        return b"".join(
            data if data is not None else _cut(fetched[number], number, offset, stop)
            for number, data in parts
        )

    def _part(self, number: int, offset: int, stop: int) -> tuple[int, bytes | None]:
        start = max(offset - number * BLOCK_BYTES, 0)
        end = min(stop - number * BLOCK_BYTES, BLOCK_BYTES)
        return number, block_cache().read(self._name, number, start, end - start)

    def _fetch(self, first: int, last: int) -> dict[int, bytes]:
        """The blocks from first to last, in requests that are not too large."""
        blocks: dict[int, bytes] = {}
        step = _MAX_REQUEST_BYTES // BLOCK_BYTES
        for begin in range(first, last + 1, step):
            stop = min(min(begin + step, last + 1) * BLOCK_BYTES, self.size_bytes)
            data = store_of(self.place).read(self.place, begin * BLOCK_BYTES, stop)
            for at in range(0, len(data), BLOCK_BYTES):
                number = begin + at // BLOCK_BYTES
                blocks[number] = data[at : at + BLOCK_BYTES]
                block_cache().write(self._name, number, blocks[number])
        return blocks


def is_remote(place: str) -> bool:
    """Whether `place` is a URL."""
    return _REMOTE.match(place) is not None


def join(folder: str, name: str) -> str:
    """A name in a folder, either of which may be local or remote; a whole place stays as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def open_blob(place: str, facts: Facts | None = None) -> Blob:
    """Open a file by path or URL. Raises OSError, or UserError for a URL that cannot be used."""
    return RemoteBlob(place, facts) if is_remote(place) else LocalBlob(place)


def read_whole(place: str, *, max_bytes: int) -> bytes:
    """A small file, past the cache. Raises OSError, also for more than `max_bytes`."""
    if not is_remote(place):
        return Path(place).read_bytes()
    store = store_of(place)
    size_bytes = store.facts(place).size_bytes
    if size_bytes > max_bytes:
        raise StoreError(f"it has {size_bytes:,} bytes; at most {max_bytes:,} are read")
    return store.read(place, 0, size_bytes) if size_bytes else b""


def store_of(url: str) -> Store:
    """The store of a URL, one a process. Raises UserError for a URL that none can read."""
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return _web_store(urlsplit(url).netloc)
    if scheme not in _EXTRAS:
        known = ", ".join(f"{name}://" for name in (*_EXTRAS, "http", "https"))
        raise UserError(f"{url}: {scheme}:// cannot be read; {known} can, and local paths")
    return _object_store(scheme, os.getpid())


@cache
def _web_store(host: str) -> Store:
    return _WebStore(host)


@cache
def _object_store(scheme: str, process_id: int) -> Store:
    from carillon.engine.data.object_store import ObjectStore

    return ObjectStore(scheme, _EXTRAS[scheme])


def block_cache() -> BlockCache:
    """The cache of this process: `$CARILLON_BLOCK_CACHE_GB` (20; 0 keeps nothing) sets its size."""
    return _block_cache(cache_root() / "blocks", os.environ.get("CARILLON_BLOCK_CACHE_GB"))


@cache
def _block_cache(folder: Path, given: str | None) -> BlockCache:
    try:
        max_bytes = DEFAULT_CACHE_BYTES if given is None else int(float(given) * 1e9)
    except (ValueError, OverflowError):
        raise UserError(f"CARILLON_BLOCK_CACHE_GB={given}: a number of gigabytes") from None
    return BlockCache(folder, max(max_bytes, 0))


def try_limit_s(num_bytes: int, left_s: float) -> float:
    """Seconds that one request for so many bytes may take."""
    return min(_TRY_S + num_bytes / _BYTES_PER_S, left_s)


class _WebStore(Store):
    def __init__(self, host: str) -> None:
        try:
            self._fetcher = Fetcher(allow=[host])
        except ValueError:
            raise UserError(f"{host!r} is no host that can be read from") from None

    def facts(self, url: str) -> Facts:
        # The first byte, since a server or a signed URL may refuse HEAD.
        headers = self._get(url, 0, 1)[1]
        total = headers.get("content-range", "").rpartition("/")[2]
        if not total.isdecimal():
            raise StoreError("the server does not say how large the file is")
        tag = headers.get("etag") or headers.get("last-modified") or ""
        return Facts(int(total), tag)

    def read(self, url: str, start: int, stop: int) -> bytes:
        data = self._get(url, start, stop)[0]
        if len(data) != stop - start:
            raise StoreError(f"{len(data):,} bytes came where {stop - start:,} were asked for")
        return data

    def list(self, url: str) -> dict[str, Facts | None]:
        raise StoreError("a web server lists no files; name them, as in x-{000..099}.tar")

    def _get(self, url: str, start: int, stop: int) -> tuple[bytes, Mapping[str, str]]:
        size = stop - start

        def attempt(left_s: float) -> tuple[bytes, Mapping[str, str]]:
            limits = FetchLimits(max_bytes=size, total_s=try_limit_s(size, left_s), idle_s=_TRY_S)
            found = self._fetcher.get(url, limits=limits, byte_range=(start, stop))
            return found.data, found.headers

        def passing(error: Exception) -> float | bool:
            if not isinstance(error, FetchError) or not error.passing:
                return False
            return error.retry_after_s or True

        try:
            return with_retries(attempt, passing, POLICY)
        except FetchError as error:
            if error.status == 416 and start == 0:
                return b"", {"content-range": "bytes */0"}
            raise StoreError(
                _web_reason(error), missing=error.status in (404, 410), is_down=error.passing
            ) from None


def _web_reason(error: FetchError) -> str:
    if error.passing:
        return f"{error}, after {POLICY.max_tries} tries; check the server, or try again later"
    return str(error)


def _blocks(offset: int, stop: int) -> range:
    return range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES) if stop > offset else 0)


def _cut(block: bytes, number: int, offset: int, stop: int) -> bytes:
    start = max(offset - number * BLOCK_BYTES, 0)
    return block[start : min(stop - number * BLOCK_BYTES, BLOCK_BYTES)]


def listed(url: str) -> Iterator[tuple[str, Facts]]:
    """The files of a remote folder by name, in order, without those of folders in it."""
    for name, facts in sorted(store_of(url).list(url).items()):
        if facts is not None:
            yield name, facts

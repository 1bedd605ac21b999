"""One item's bytes and texts: from disk, from a store or fetched, and looked into.

Fetching is polite: an honest user agent, pages' wish not to be used is kept (X-Robots-Tag), a host
that does not answer many times in a row is left alone for a while. What fails and may pass is tried
again with growing pauses, within the item's time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from carillon.engine.config import UserError
from carillon.engine.data.fetch import USER_AGENT, Fetcher, FetchError, FetchLimits
from carillon.engine.data.ingest_inspection import Inspectors
from carillon.engine.data.ingest_items import Inline, Item, LocalFile, Span, Url, Where
from carillon.engine.data.ingest_texts import MAX_TEXT_BYTES, add_text, has_text
from carillon.engine.data.retry import RetryPolicy, with_retries
from carillon.engine.data.samples import modality_of
from carillon.engine.data.store import StoreError, open_blob, read_whole

_UNWANTED = ("noai", "noimageai", "noindex", "noimageindex", "none")
_AGENT = "carillon-engine"
_MAX_FAILURES = 20
_LEFT_ALONE_S = 60.0
_MAX_HOSTS = 100_000


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How URLs are fetched."""

    allow_hosts: tuple[str, ...] = ()
    user_agent: str = USER_AGENT
    timeout_s: float = 60.0
    tries: int = 4
    first_pause_s: float = 1.0
    max_item_bytes: int = 256 << 20


class Loaded(NamedTuple):
    """An item as it will be stored: members by name, and the facts of each."""

    members: dict[str, bytes]
    media: dict[str, dict[str, Any]]


class Loader:
    """Loads items; may be called by several threads at a time."""

    def __init__(
        self,
        options: FetchOptions,
        inspectors: Inspectors,
        *,
        max_size: int | None,
        default_language: str,
    ) -> None:
        self._options, self._inspectors = options, inspectors
        self._max_size, self._default_language = max_size, default_language
        limits = FetchLimits(max_bytes=options.max_item_bytes, total_s=options.timeout_s)
        self._fetcher = Fetcher(
            allow=options.allow_hosts, user_agent=options.user_agent, limits=limits
        )
        self._health = HostHealth()

    def load(self, item: Item) -> Loaded | str:
        """The item's bytes, its texts put into it; or the reason why it cannot be used.

        Raises UserError when the store that it lies in fails as a whole: no item's fault.
        """
        try:
            for suffix, language, where in item.texts:
                data = self._read(where, MAX_TEXT_BYTES)
                add_text(item, suffix, language, data, self._default_language)
            if not item.may_be_silent and not has_text(item):
                return "no caption is left in the texts beside it" if item.texts else "no caption"
            members: dict[str, bytes] = {}
            media: dict[str, dict[str, Any]] = {}
            for name, where in item.members.items():
                data = self._read(where, self._options.max_item_bytes)
                found = self._inspectors.inspect(data, self._max_size)
                stored = _member_name(name, found.suffix)
                members[stored], media[stored] = found.data, found.facts
        except UserError:  # such as a library that is not installed
            raise
        except StoreError as error:
            if error.is_down:
                raise UserError(
                    f"{item.source}/{item.name} cannot be read: {error.strerror}. The same command "
                    "goes on from here."
                ) from None
            return f"cannot be read: {error.strerror}"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return str(error)
        return Loaded(members, media)

    def _read(self, where: Where, max_bytes: int) -> bytes:
        if isinstance(where, Inline):
            data, size = where.data, len(where.data)
        elif isinstance(where, Url):
            return self._fetched(where.url)
        elif isinstance(where, LocalFile):
            size = where.path.stat().st_size
            data = where.path.read_bytes() if size <= max_bytes else b""
        else:
            size, data = _span(where, max_bytes)
        if size > max_bytes:
            raise ValueError(f"{size:,} bytes; at most {max_bytes:,} are taken")
        return data

    def _fetched(self, url: str) -> bytes:
        host = host_of(url)
        self._health.check(host)
        policy = RetryPolicy(
            max_tries=self._options.tries,
            first_pause_s=self._options.first_pause_s,
            deadline_s=self._options.timeout_s,
        )

        def attempt(left_s: float) -> bytes:
            limits = FetchLimits(max_bytes=self._options.max_item_bytes, total_s=left_s)
            found = self._fetcher.get(url, limits=limits)
            if wish := unwanted(found.headers):
                raise ValueError(f"the site asks not to use it (X-Robots-Tag: {wish})")
            return found.data

        try:
            data = with_retries(attempt, _passing, policy)
        except FetchError as error:
            if error.kind == "unreachable":
                self._health.failed(host)
            else:
                self._health.answered(host)
            raise
        self._health.answered(host)
        return data


def _span(where: Span, max_bytes: int) -> tuple[int, bytes]:
    if where.size is None:  # read once, so past the cache of blocks
        data = read_whole(where.place, max_bytes=max_bytes)
        return len(data), data
    if where.size > max_bytes:
        return where.size, b""
    return where.size, open_blob(where.place).read(where.offset, where.size)


def _passing(error: Exception) -> float | bool:
    if not isinstance(error, FetchError) or not error.passing:
        return False
    return error.retry_after_s or True


def _member_name(name: str, suffix: str) -> str:
    """The name by which a member is stored: its label, and its suffix by content."""
    label, _, stated = name.rpartition(".")
    if modality_of(stated) is None and stated:
        label = name
    return f"{label}.{suffix}" if label else suffix


def host_of(url: str) -> str:
    """Host and port of a URL, for limits by host; the URL itself where none can be read."""
    try:
        return urlsplit(url).netloc.lower() or url
    except ValueError:
        return url


def unwanted(headers: Mapping[str, str]) -> str | None:
    """The wish not to be used in an answer's headers, if it concerns everybody or us."""
    agent = "*"
    for part in headers.get("x-robots-tag", "").lower().split(","):
        name, colon, rest = part.partition(":")
        if colon and name.strip() not in ("unavailable_after", "max-snippet", "max-image-preview"):
            agent, part = name.strip(), rest
        if part.strip() in _UNWANTED and agent in ("*", _AGENT):
            return part.strip()
    return None


class HostHealth:
    """Hosts that did not answer: after many failures in a row one is left alone for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def check(self, host: str) -> None:
        """Raises ValueError while the host is left alone."""
        with self._lock:
            failures, until = self._failures.get(host, (0, 0.0))
        if failures >= _MAX_FAILURES and time.monotonic() < until:
            raise ValueError(f"{host} could not be reached {failures} times in a row; left alone")

    def failed(self, host: str) -> None:
        with self._lock:
            failures, _ = self._failures.pop(host, (0, 0.0))
            self._failures[host] = (failures + 1, time.monotonic() + _LEFT_ALONE_S)
            if len(self._failures) > _MAX_HOSTS:
                self._failures.popitem(last=False)

    def answered(self, host: str) -> None:
        with self._lock:
            self._failures.pop(host, None)

"""Fetches a URL that nobody vouches for: public hosts only, and within limits of bytes and time.

Every hop of a redirect is checked as the first URL was (fetch_address.py), its host is resolved
once, and the connection goes to the address that was checked (fetch_connection.py). The body is
counted while it comes, before and after decompression, so an endless or exploding one is cut at
the cap. Certificates are verified against the system's authorities.
It is a thin layer over the standard library's http.client: pinning an address while checking the
name's certificate, and one deadline over headers and body, need the socket, which the well-kept
libraries (urllib3, requests, httpx) hide behind pools; and serving needs no dependency for it.
Left out: proxies, HTTP/2, cookies, connections that are kept, methods but GET and HEAD.
"""

from __future__ import annotations

import http.client
import queue
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple
from urllib.parse import urljoin

from carillon import __version__
from carillon.engine.data.fetch_address import (
    Target,
    check_address,
    parse_exceptions,
    parse_url,
)
from carillon.engine.data.fetch_body import Body, Unreachable, explained
from carillon.engine.data.fetch_body import FetchError as FetchError
from carillon.engine.data.fetch_connection import Budget, OutOfTime, PinnedConnection

USER_AGENT = f"carillon-engine/{__version__} (data set builder)"

_OVERHEAD_BYTES = 1 << 20  # for headers and the framing of chunks, beside max_bytes
_MAX_ADDRESSES = 4
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others a little later

_CONTEXT_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What one fetch may cost, redirects included."""

    max_bytes: int = 64 << 20
    total_s: float = 60.0
    idle_s: float = 15.0
    max_redirects: int = 5


class Fetched(NamedTuple):
    """A whole body; `url` is the one that gave it, after redirects."""

    url: str
    status: int
    headers: Mapping[str, str]
    data: bytes


class Fetcher:
    """Fetches by one set of rules; may be shared by threads and processes.

    `allow` lists hosts, addresses and networks that may be fetched although they are inside.
    Raises ValueError for an entry that is none of these.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] = (),
        user_agent: str = USER_AGENT,
        limits: FetchLimits | None = None,
    ) -> None:
        self._exceptions = parse_exceptions(allow)
        self._user_agent = user_agent
        self._limits = limits or FetchLimits()

    def get(
        self,
        url: str,
        *,
        limits: FetchLimits | None = None,
        content_types: Sequence[str] = (),
        byte_range: tuple[int, int] | None = None,
    ) -> Fetched:
        """The whole body of a URL, or of its bytes [start, end).

        `content_types` are the beginnings of media types that are taken (`image/`); empty: any.
        Raises FetchError.
        """
        with self.open(
            url, limits=limits, content_types=content_types, byte_range=byte_range
        ) as body:
            data = b"".join(iter(body.read, b""))
            return Fetched(body.url, body.status, body.headers, data)

    def head(self, url: str, *, limits: FetchLimits | None = None) -> Fetched:
        """Status and headers of a URL, without its body. Raises FetchError."""
        with self._open(url, limits or self._limits, method="HEAD", headers={}) as body:
            return Fetched(body.url, body.status, body.headers, b"")

    @contextmanager
    def open(
        self,
        url: str,
        *,
        limits: FetchLimits | None = None,
        content_types: Sequence[str] = (),
        byte_range: tuple[int, int] | None = None,
    ) -> Iterator[Body]:
        """As `get`, for reading piece by piece."""
        headers = {}
        if byte_range is not None:
            headers["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
        with self._open(url, limits or self._limits, method="GET", headers=headers) as body:
            if byte_range is not None and body.status != 206:
                raise FetchError(
                    "the server gives whole files only, no byte ranges", "status", status=200
                )
            if byte_range is None and body.status == 206:
                raise FetchError("a part came where the whole was asked for", "broken")
            if content_types and not body.content_type.startswith(tuple(content_types)):
                raise FetchError(
                    f"the content type is {body.content_type or 'not stated'}; "
                    f"{', '.join(content_types)} is taken",
                    "type",
                )
            yield body

    @contextmanager
    def _open(
        self, url: str, limits: FetchLimits, *, method: str, headers: Mapping[str, str]
    ) -> Iterator[Body]:
        budget = Budget(limits.total_s, limits.idle_s, limits.max_bytes + _OVERHEAD_BYTES)
        for _ in range(limits.max_redirects + 1):
            with explained(limits.max_bytes):
                target = parse_url(url)
                connection = self._connect(target, budget)
            try:
                with explained(limits.max_bytes):
                    response = self._request(connection, target, method, headers)
                if response.status not in _REDIRECTS:
                    _check_status(response)
                    yield Body(target, response, limits.max_bytes, whole=method == "GET")
                    return
                url = _next_url(target, response)
            finally:
                connection.shut()
        raise FetchError(f"more than {limits.max_redirects} redirects", "refused")

    def _request(
        self, connection: PinnedConnection, target: Target, method: str, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        sent = {
            "User-Agent": self._user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request(method, target.path, headers={**sent, **headers})
        return connection.getresponse()

    def _connect(self, target: Target, budget: Budget) -> PinnedConnection:
        found = _resolve(target, budget.time_left_s())
        # One inside address among several is enough to refuse: the next look-up might lead there.
        addresses = [check_address(target, one, self._exceptions) for one in found]
        failure: OSError = OSError("no address")
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                return PinnedConnection(target, address, budget, _context)
            except OutOfTime as error:
                failure = error
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
        raise Unreachable(target.host, failure)


def _context() -> ssl.SSLContext:
    """The one that verifies certificates; reading the authorities takes a quarter of a second."""
    # The lock spares threads the same work; a fork may have copied it held, so none waits for long.
    is_held = _CONTEXT_LOCK.acquire(timeout=5)
    try:
        return _made_context()
    finally:
        if is_held:
            _CONTEXT_LOCK.release()


@cache
def _made_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _resolve(target: Target, timeout_s: float) -> list[str]:
    """The addresses of a host. The system's look-up knows no deadline, so it runs aside."""
    answer: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            answer.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=look_up, daemon=True, name="resolve").start()
    try:
        found = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise Unreachable(target.host, OutOfTime(f"no name in {timeout_s:.0f} s")) from None
    if isinstance(found, Exception):
        raise Unreachable(target.host, OSError("its name is unknown"))
    return found


def _check_status(response: http.client.HTTPResponse) -> None:
    if response.status in (200, 206):
        return
    after = response.getheader("Retry-After", "")
    raise FetchError(
        f"HTTP status {response.status}",
        "status",
        status=response.status,
        passing=response.status in _PASSING,
        retry_after_s=float(after) if after.isascii() and after.isdecimal() else None,
    )


def _next_url(target: Target, response: http.client.HTTPResponse) -> str:
    location = response.getheader("Location")
    if not location:
        raise FetchError("a redirect that leads nowhere", "broken")
    try:
        # Headers are Latin-1 to http.client; UTF-8 is what servers send in them.
        return urljoin(target.url, location.encode("latin-1").decode("utf-8", "replace"))
    except ValueError as error:
        raise FetchError(f"a redirect that cannot be read: {error}", "refused") from None

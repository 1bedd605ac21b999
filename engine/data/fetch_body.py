"""The body of an answer, read piece by piece within limits, and what a fetch can fail by.

Bytes are counted before and after decompression, so neither an endless body nor one that explodes
gets past the cap. What the connection and the protocol run into becomes a FetchError.
"""

from __future__ import annotations

import http.client
import ssl
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from carillon.engine.data.fetch_address import RefusedAddress, Target
from carillon.engine.data.fetch_connection import OutOfBudget, OutOfTime

_PIECE_BYTES = 1 << 16

Kind = Literal["refused", "unreachable", "slow", "too large", "broken", "status", "type"]


class FetchError(ValueError):
    """A URL could not be fetched. `passing`: trying again later may help, after `retry_after_s`."""

    def __init__(
        self,
        reason: str,
        kind: Kind,
        *,
        passing: bool = False,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.kind, self.passing = kind, passing
        self.status, self.retry_after_s = status, retry_after_s


class Unreachable(Exception):
    """No connection could be made."""

    def __init__(self, host: str, failure: OSError) -> None:
        reason = failure if isinstance(failure, OutOfTime) else failure.strerror or failure
        super().__init__(f"no connection to {host}: {reason}")


class Body:
    """An open response: `read` gives the next bytes of its decompressed body, within the limits."""

    def __init__(
        self, target: Target, response: http.client.HTTPResponse, max_bytes: int, *, whole: bool
    ) -> None:
        self.url, self.status = target.url, response.status
        names = {name.lower() for name in response.headers}
        self.headers = {name: response.getheader(name, "") for name in names}
        self._response, self._max_bytes, self._num_bytes = response, max_bytes, 0
        self._expected = response.length if whole else None
        self._received = 0
        self._inflate = _inflater(self.headers.get("content-encoding", ""))
        if self._expected is not None and self._expected > max_bytes:
            raise too_large(max_bytes)

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters; empty when none is stated."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def read(self) -> bytes:
        """The next piece, at most 64 KiB; empty at the end. Raises FetchError."""
        while True:
            left = self._max_bytes - self._num_bytes + 1
            if self._inflate is None:
                piece = self._receive()
            else:
                packed = self._inflate.unconsumed_tail or self._receive()
                if not packed:
                    self._check_inflated()
                    return b""
                piece = self._expand(packed, left)
                if not piece:
                    continue
            self._num_bytes += len(piece)
            if self._num_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            return piece

    def _receive(self) -> bytes:
        size = _PIECE_BYTES
        if self._expected is not None:  # a server need not close after what it announced
            size = min(size, self._expected - self._received)
        with explained(self._max_bytes):
            piece = self._response.read1(size) if size else b""
        self._received += len(piece)
        if not piece and self._expected is not None and self._received < self._expected:
            raise FetchError(
                f"the body ended after {self._received:,} of {self._expected:,} bytes",
                "broken",
                passing=True,
            )
        return piece

    def _expand(self, data: bytes, left: int) -> bytes:
        assert self._inflate is not None
        try:
            return self._inflate.decompress(data, min(left, _PIECE_BYTES))
        except zlib.error as error:
            raise FetchError(f"the compressed body is damaged: {error}", "broken") from None

    def _check_inflated(self) -> None:
        if self._received and self._inflate is not None and not self._inflate.eof:
            raise FetchError("the compressed body ended too early", "broken", passing=True)


@contextmanager
def explained(max_bytes: int) -> Iterator[None]:
    """Turn what a fetch runs into into a FetchError."""
    try:
        yield
    except RefusedAddress as error:
        raise FetchError(str(error), "refused") from None
    except Unreachable as error:
        raise FetchError(str(error), "unreachable", passing=True) from None
    except OutOfTime as error:
        raise FetchError(str(error), "slow", passing=True) from None
    except OutOfBudget:
        raise too_large(max_bytes) from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError(f"the certificate: {error.verify_message}", "refused") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = str(error) or type(error).__name__
        raise FetchError(f"the answer is broken: {said:.200}", "broken", passing=True) from None


def too_large(max_bytes: int) -> FetchError:
    """The error of a body above the cap."""
    return FetchError(f"more than {max_bytes:,} bytes", "too large")


def _inflater(encoding: str) -> zlib._Decompress | None:
    """What undoes a Content-Encoding that came although none was asked for."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=47)  # gzip or zlib, by the first bytes
    raise FetchError(f"the content encoding {encoding!r:.40}; gzip and deflate are read", "type")

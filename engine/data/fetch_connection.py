"""A connection to one checked address, on which no read outlasts its deadline or its budget.

The standard library's HTTP client reads from a file that its socket makes. Here that file sets the
time that is left before every read and counts the bytes, so a server that trickles headers, chunk
sizes or endless `100 Continue`s is cut off like one that trickles a body. The address comes from
the caller, who has checked it; the host's name is used for TLS (certificate and SNI) and for the
Host header alone, so nothing is resolved twice.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from carillon.engine.data.fetch_address import Address, Target


class OutOfTime(TimeoutError):
    """The deadline or the longest pause has passed."""


class OutOfBudget(Exception):
    """More bytes came than were allowed."""


class Budget:
    """What a fetch may still use: time until `deadline`, pauses of `idle_s`, bytes."""

    def __init__(self, total_s: float, idle_s: float, max_bytes: int) -> None:
        self._deadline = time.monotonic() + total_s
        self._total_s, self._idle_s, self._bytes_left = total_s, idle_s, max_bytes

    def time_left_s(self) -> float:
        """Seconds until the deadline, at most a pause. Raises OutOfTime when none is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime(f"it took more than {self._total_s:g} s")
        return min(left, self._idle_s)

    def paused(self) -> OutOfTime:
        """What to raise when a wait of `time_left_s` brought nothing."""
        self.time_left_s()
        return OutOfTime(f"nothing came for {self._idle_s:g} s")

    def count(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise OutOfBudget


class PinnedConnection(http.client.HTTPConnection):
    """An HTTP connection to `address`, whatever the target's name resolves to by now.

    Raises OutOfTime, OSError and ssl.SSLError while it connects.
    """

    def __init__(
        self,
        target: Target,
        address: Address,
        budget: Budget,
        context: Callable[[], ssl.SSLContext],
    ) -> None:
        super().__init__(target.host, target.port)
        self.default_port = 443 if target.scheme == "https" else 80  # not named in the Host header
        self._raw = _connect(target, address, budget, context)
        self.sock: Any = _BudgetedSocket(self._raw, budget)

    def shut(self) -> None:
        """Close the socket; `close` leaves it to a response that still reads from it."""
        self._raw.close()


def _connect(
    target: Target, address: Address, budget: Budget, context: Callable[[], ssl.SSLContext]
) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.settimeout(budget.time_left_s())
        raw.connect((str(address), target.port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.scheme == "https":
            raw.settimeout(budget.time_left_s())
            return context().wrap_socket(raw, server_hostname=target.host)
    except TimeoutError:
        raw.close()
        raise budget.paused() from None
    except BaseException:
        raw.close()
        raise
    return raw


class _BudgetedSocket:
    """As much of a socket as http.client uses."""

    def __init__(self, sock: socket.socket, budget: Budget) -> None:
        self._sock, self._budget = sock, budget

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._budget.time_left_s())
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise self._budget.paused() from None

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_BudgetedReader(self._sock, self._budget), 1 << 16)

    def close(self) -> None:
        """Nothing: http.client closes before it reads the body, see PinnedConnection.shut."""


class _BudgetedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, budget: Budget) -> None:
        self._sock, self._budget = sock, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._budget.time_left_s())
        try:
            num_bytes = self._sock.recv_into(buffer)
        except TimeoutError:
            raise self._budget.paused() from None
        self._budget.count(num_bytes)
        return num_bytes

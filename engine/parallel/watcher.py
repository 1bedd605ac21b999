"""The process beside a training process: it looks, hears the others, and ends its process.

The watcher of rank 0 is the hub that all others connect to. A watcher that falls silent is taken
for a lost machine. One whose connection closes is gone, and its process may live: then the process
still listens at its door, a socket of its own, and a connection to that takes the watcher's place.
It closes when the process ends. So a process without a watcher is no loss, and its end is found;
that it is stopped is not.
Status: runs on Linux.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import selectors
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

_POLL_S = 2.0
_STACKS_S = 2.0  # for a process to write its stacks
_MAX_LINE_BYTES = 4096
_OTHER_FILES = 64  # besides a socket for each watcher


class _Peer:
    """Another watcher at the end of a socket, which speaks in lines."""

    def __init__(self, connection: socket.socket, host: str) -> None:
        self.take(connection)
        self.rank: int | None = None
        self.host, self.port = host, 0  # of the door of its process
        self.silent = 0  # polls since something was heard
        self.left = self.unwatched = False

    def take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.gone, self._unread = connection, False, b""

    def lines(self) -> list[str]:
        """What arrived, in whole lines. A peer that closes or floods is gone."""
        try:
            data = self.connection.recv(_MAX_LINE_BYTES)
        except OSError:
            data = b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        self.gone = not data or len(self._unread) > _MAX_LINE_BYTES
        return [line.decode(errors="replace") for line in lines]

    def tell(self, line: str) -> None:
        with suppress(OSError):  # a peer that cannot be told finds out by itself
            self.connection.send((line + "\n").encode())


class Watcher:
    """The forked process. It counts polls, not time: a suspended machine is no loss."""

    def __init__(
        self, rank: int, parent: int, watchdog_s: int, orders: socket.socket, stacks: int, door: int
    ) -> None:
        self.rank, self.parent, self.stacks, self.door = rank, parent, stacks, door
        self.name = f"rank {rank} (process {parent} on {socket.gethostname()})"
        self.poll_s = min(_POLL_S, watchdog_s / 4)
        self.patience = round(watchdog_s / self.poll_s)
        self.stopped = 0  # polls in a row at which the process was stopped
        self.selector = selectors.DefaultSelector()  # select() itself ends at descriptor 1023
        self.orders = _Peer(orders, "")
        self.selector.register(orders, selectors.EVENT_READ, self.orders)
        self.peers: list[_Peer] = []

    def run(self, hub: socket.socket | None, token: str, size: int) -> None:
        """Until its process leaves or the run ends. Those who connect to the hub give the token."""
        self.hub, self.token = hub, token
        if hub is not None:
            _allow_files(size + _OTHER_FILES)
            self.selector.register(hub, selectors.EVENT_READ)
        next_poll = time.monotonic() + self.poll_s
        lost: str | None = None
        while lost is None:
            for key, _ in self.selector.select(max(0.0, next_poll - time.monotonic())):
                if hub is not None and key.fileobj is hub:
                    connection, (host, _) = hub.accept()
                    self._add(_Peer(connection, host))
                    continue
                peer = key.data
                for line in peer.lines():
                    if peer is self.orders and line == "leave":
                        self._tell_all("left")
                        return
                    lost = self._hear(peer, line) or lost
                if peer.gone:
                    lost = lost or self._close(peer)
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self.poll_s
                lost = lost or self._poll()
        self._tell_all(f"lost {lost}")
        self._end(lost)

    def _hear(self, peer: _Peer, line: str) -> str | None:
        peer.silent = 0
        if peer is self.orders:
            self._connect(**json.loads(line))
        elif peer.rank is None:  # a stranger at the hub, until it gives the token
            token, _, place = line.partition(" ")
            known = secrets.compare_digest(token.encode(), self.token.encode())
            rank, _, port = place.partition(" ")
            peer.gone = not (known and rank.isdecimal() and port.isdecimal())
            if not peer.gone:
                peer.rank, peer.port = int(rank), int(port)
        elif line == "left":
            peer.left = True
        elif line.startswith("lost "):
            return line.removeprefix("lost ")
        return None

    def _connect(self, host: str, port: int, token: str) -> None:
        if self.hub is None:
            with suppress(OSError):  # a firewall between the nodes: each watches its own process
                peer = _Peer(socket.create_connection((host, port), timeout=10), host)
                peer.rank, peer.port = 0, port
                peer.tell(f"{token} {self.rank} {self.door}")
                self._add(peer)

    def _add(self, peer: _Peer) -> None:
        self.peers.append(peer)
        self.selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _close(self, peer: _Peer) -> str | None:
        """Of a peer that is gone; what is lost, unless it has left or its process lives."""
        self.selector.unregister(peer.connection)
        peer.connection.close()
        if peer is self.orders:  # the next poll finds out why
            return None
        if peer.rank is None or peer.left:
            self.peers.remove(peer)
            return None
        ended = f"rank {peer.rank} and its watcher ended without a word: killed, or a lost node"
        if peer.unwatched:
            return ended
        try:
            door = socket.create_connection((peer.host, peer.port), timeout=self.poll_s)
        except ConnectionRefusedError:
            return ended
        except OSError:  # it cannot be told: from now on it is silent
            return None
        peer.take(door)
        peer.unwatched = True
        self.selector.register(door, selectors.EVENT_READ, peer)
        if self.hub is not None or self.rank == 1:  # once is enough
            alone = " Each process is watched by its own watcher alone." if peer.rank == 0 else ""
            _write(
                f"carillon: the watcher of rank {peer.rank} has died. Its process lives and the "
                f"run goes on, but nobody sees it if that process is stopped.{alone}\n"
            )
        return None

    def _poll(self) -> str | None:
        self._tell_all("beat")
        for peer in list(self.peers):
            peer.silent += 1
            if peer.silent <= self.patience or peer.left or peer.unwatched:
                continue
            if peer.rank is not None:
                return f"rank {peer.rank} has been silent for {peer.silent * self.poll_s:.0f} s"
            self._close(peer)  # it had a while to give the token
        state = _state(self.parent)
        if state is None or os.getppid() != self.parent:
            return f"{self.name} ended without a word: killed, or out of memory"
        self.stopped = self.stopped + 1 if state == "T" else 0
        if self.stopped > self.patience:
            return f"{self.name} has been stopped for {self.stopped * self.poll_s:.0f} s"
        return None

    def _tell_all(self, line: str) -> None:
        for peer in self.peers:
            if peer.rank is not None and not peer.unwatched:
                peer.tell(line)

    def _end(self, lost: str) -> None:
        if os.getppid() != self.parent:
            _write(f"carillon: {lost}; the run ends\n")
            return
        with suppress(ProcessLookupError):
            before = os.fstat(self.stacks).st_size
            os.kill(self.parent, signal.SIGUSR2)
            os.kill(self.parent, signal.SIGCONT)  # a stopped one acts on signals only then
            stacks = self._read_stacks(before)
            _write(
                f"carillon: [rank {self.rank}] {lost}; this process ends. Its stacks:\n{stacks}\n"
            )
            os.kill(self.parent, signal.SIGKILL)

    def _read_stacks(self, before: int) -> str:
        """What the process has written, once that has stopped growing."""
        size, began = before, time.monotonic()
        while time.monotonic() - began < _STACKS_S:
            time.sleep(0.2)
            grown = os.fstat(self.stacks).st_size
            if grown == size > before:
                break
            size = grown
        return os.pread(self.stacks, 1 << 20, 0).decode(errors="replace")


def _allow_files(num: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num if hard == resource.RLIM_INFINITY else min(num, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _state(pid: int) -> str | None:
    """R, S, D, T (stopped), ... as in proc(5); none for a process that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[0]


def _write(text: str) -> None:
    """In one piece, so that the stacks of several processes do not mix."""
    os.write(2, text.encode())

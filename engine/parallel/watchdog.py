"""Ends a run of which one process was stopped or killed, with the stacks of every process.

Beside each training process stands a watcher that is forked before anything else: it needs neither
the interpreter's lock nor a device, so a long step never looks like a stopped one. Every two
seconds it looks whether its process runs, is stopped or is gone, and sends a beat: the watcher of
rank 0 hears all others, they hear that of rank 0. Who finds a process that is gone, or stopped or
silent for `watchdog_s`, tells the rest. Then every watcher has its process write its stacks, a
stopped one too, and kills it: no collective is waited for, and the launcher sees an exit code.
Left out: a process that runs and makes no progress; its collectives end by `timeout_s`.
Status: runs on Linux; on systems without /proc nothing is watched.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import select
import signal
import socket
import tempfile
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

_POLL_S = 2.0
_STACKS_S = 2.0  # for a process to write its stacks
_LEAVING_S = 1.0  # for a watcher to tell the others that its process leaves
_MAX_LINE_BYTES = 4096
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Watchdog:
    """Has this process watched inside; one that stands alone, or `watchdog_s` 0, is not."""

    def __init__(self, watchdog_s: int) -> None:
        self._watchdog_s = watchdog_s
        self._watcher = 0
        self._kept = ExitStack()

    def __enter__(self) -> Watchdog:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if size == 1 or self._watchdog_s == 0 or not Path("/proc/self/stat").exists():
            return self
        stacks = self._kept.enter_context(tempfile.TemporaryFile())
        self._hub = self._kept.enter_context(socket.socket()) if rank == 0 else None
        self._token = secrets.token_hex(16) if rank == 0 else ""
        if self._hub is not None:
            self._hub.bind(("", 0))
            self._hub.listen(size)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        self._kept.callback(faulthandler.unregister, signal.SIGUSR2)
        parent = os.getpid()
        orders, self._orders = socket.socketpair()
        self._watcher = os.fork()
        if self._watcher == 0:
            try:
                self._orders.close()
                for number in _IGNORED:
                    signal.signal(number, signal.SIG_IGN)
                watcher = _Watcher(rank, parent, self._watchdog_s, orders, stacks.fileno())
                watcher.run(self._hub, self._token)
            except Exception:
                _write(f"carillon: the watcher of rank {rank} failed\n{traceback.format_exc()}")
            finally:
                os._exit(0)
        orders.close()
        self._kept.enter_context(self._orders)
        return self

    def join(self) -> None:
        """Connect the watchers of all processes; every rank calls it in the process group."""
        if not self._watcher:
            return
        told: list[Any] = [None]
        if self._hub is not None:
            told = [{"port": self._hub.getsockname()[1], "token": self._token}]
        dist.broadcast_object_list(told, src=0)
        host = "127.0.0.1" if self._hub is not None else os.environ["MASTER_ADDR"]
        self._orders.sendall((json.dumps(told[0] | {"host": host}) + "\n").encode())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watcher:
            with suppress(OSError):  # it may have been killed
                self._orders.sendall(b"leave\n")
            until = time.monotonic() + _LEAVING_S
            while os.waitpid(self._watcher, os.WNOHANG)[0] == 0:
                if time.monotonic() > until:
                    os.kill(self._watcher, signal.SIGKILL)
                time.sleep(0.005)
        self._kept.close()


class _Peer:
    """Another watcher at the end of a socket, which speaks in lines."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank: int | None = None
        self.silent = 0  # polls since something was heard
        self.gone = self.left = False
        self._unread = b""

    def lines(self) -> list[str]:
        """What arrived, in whole lines. A peer that closes or floods is gone: it is silent."""
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


class _Watcher:
    """The forked process. It counts polls, not time: a suspended machine is no loss."""

    def __init__(
        self,
        rank: int,
        parent: int,
        watchdog_s: int,
        orders: socket.socket,
        stacks: int,
    ) -> None:
        self.rank, self.parent, self.stacks = rank, parent, stacks
        self.name = f"rank {rank} (process {parent} on {socket.gethostname()})"
        self.poll_s = min(_POLL_S, watchdog_s / 4)
        self.patience = round(watchdog_s / self.poll_s)
        self.stopped = 0  # polls in a row at which the process was stopped
        self.orders = _Peer(orders)
        self.peers: list[_Peer] = []

    def run(self, hub: socket.socket | None, token: str) -> None:
        """Until its process leaves or the run ends. Those who connect to the hub give the token."""
        self.hub, self.token = hub, token
        next_poll = time.monotonic() + self.poll_s
        lost: str | None = None
        while lost is None:
            waiting = [peer for peer in (self.orders, *self.peers) if not peer.gone]
            sources: list[Any] = [peer.connection for peer in waiting]
            sources += [self.hub] if self.hub is not None else []
            ready = select.select(sources, [], [], max(0.0, next_poll - time.monotonic()))[0]
            if self.hub is not None and self.hub in ready:
                self.peers.append(_Peer(self.hub.accept()[0]))
            for peer in waiting:
                for line in peer.lines() if peer.connection in ready else ():
                    if peer is self.orders and line == "leave":
                        self._tell_all("left")
                        return
                    lost = self._hear(peer, line) or lost
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self.poll_s
                lost = self._poll() or lost
        self._tell_all(f"lost {lost}")
        self._end(lost)

    def _hear(self, peer: _Peer, line: str) -> str | None:
        peer.silent = 0
        if peer is self.orders:
            self._connect(**json.loads(line))
        elif peer.rank is None:  # a stranger at the hub, until it gives the token
            token, _, rank = line.partition(" ")
            known = secrets.compare_digest(token.encode(), self.token.encode())
            peer.gone = not (known and rank.isdecimal())
            peer.rank = None if peer.gone else int(rank)
        elif line == "left":
            peer.left = True
        elif line.startswith("lost "):
            return line.removeprefix("lost ")
        return None

    def _connect(self, host: str, port: int, token: str) -> None:
        if self.hub is None:
            with suppress(OSError):  # a firewall between the nodes: each watches its own process
                peer = _Peer(socket.create_connection((host, port), timeout=10))
                peer.rank = 0
                peer.tell(f"{token} {self.rank}")
                self.peers.append(peer)

    def _poll(self) -> str | None:
        self._tell_all("beat")
        # A peer without a rank has a while to give the token.
        self.peers = [p for p in self.peers if p.rank is not None or p.silent < self.patience]
        for peer in self.peers:
            peer.silent += 1
            if peer.silent > self.patience and not peer.left and peer.rank is not None:
                return f"rank {peer.rank} has been silent for {peer.silent * self.poll_s:.0f} s"
        state = _state(self.parent)
        if state is None or os.getppid() != self.parent:
            return f"{self.name} ended without a word: killed, or out of memory"
        self.stopped = self.stopped + 1 if state == "T" else 0
        if self.stopped > self.patience:
            return f"{self.name} has been stopped for {self.stopped * self.poll_s:.0f} s"
        return None

    def _tell_all(self, line: str) -> None:
        for peer in self.peers:
            if peer.rank is not None:
                peer.tell(line)

    def _end(self, lost: str) -> None:
        if os.getppid() != self.parent:
            _write(f"carillon: {lost}; the run ends\n")
            return
        with suppress(ProcessLookupError):
            os.kill(self.parent, signal.SIGUSR2)
            os.kill(self.parent, signal.SIGCONT)  # a stopped one acts on signals only then
            stacks = self._read_stacks()
            _write(
                f"carillon: [rank {self.rank}] {lost}; this process ends. Its stacks:\n{stacks}\n"
            )
            os.kill(self.parent, signal.SIGKILL)

    def _read_stacks(self) -> str:
        """What the process has written, once that has stopped growing."""
        size, began = -1, time.monotonic()
        while time.monotonic() - began < _STACKS_S:
            time.sleep(0.2)
            grown = os.fstat(self.stacks).st_size
            if grown == size > 0:
                break
            size = grown
        return os.pread(self.stacks, 1 << 20, 0).decode(errors="replace")


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

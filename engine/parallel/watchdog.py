"""Ends a run of which one process was stopped or killed, with the stacks of every process.

Beside each training process stands a watcher (watcher.py) that is forked before anything else: it
needs neither the interpreter's lock nor a device, so a long step never looks like a stopped one.
Every two seconds it looks whether its process runs, is stopped or is gone, and sends a beat: the
watcher of rank 0 hears all others, they hear that of rank 0. Who finds a process that is gone, or
stopped or silent for `watchdog_s`, tells the rest. Then every watcher has its process write its
stacks, a stopped one too, and kills it: no collective is waited for, and the launcher sees an exit
code. Where collectives fail at once because of the loss (gloo), the error waits for that verdict.
Left out: a process that runs and makes no progress; its collectives end by `timeout_s`.
Status: runs on Linux; on systems without /proc nothing is watched.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
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

from carillon.engine.parallel.watcher import Watcher

_VERDICT_S = 8.0  # in which the watchers find and tell that a process was killed
_LEAVING_S = 10.0  # for a watcher to tell the others that its process leaves; it takes no time
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
        self._stacks = self._kept.enter_context(tempfile.TemporaryFile())
        self._is_hub = rank == 0
        self._token = secrets.token_hex(16) if self._is_hub else ""
        # It is open as long as this process lives. That of rank 0 is also where watchers meet.
        self._door = self._kept.enter_context(socket.socket())
        self._door.bind(("", 0))
        self._door.listen(size if self._is_hub else 1)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._kept.callback(faulthandler.unregister, signal.SIGUSR2)
        parent = os.getpid()
        orders, self._orders = socket.socketpair()
        self._watcher = os.fork()
        if self._watcher == 0:
            try:
                for number in _IGNORED:
                    signal.signal(number, signal.SIG_IGN)
                self._orders.close()
                watch = (self._watchdog_s, orders, self._stacks.fileno())
                watcher = Watcher(rank, parent, *watch, self._door.getsockname()[1])
                if not self._is_hub:
                    self._door.close()
                watcher.run(self._door if self._is_hub else None, self._token, size)
            except Exception:
                text = f"carillon: the watcher of rank {rank} failed\n{traceback.format_exc()}"
                os.write(2, text.encode())
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
        if self._is_hub:
            told = [{"port": self._door.getsockname()[1], "token": self._token}]
        dist.broadcast_object_list(told, src=0)
        host = "127.0.0.1" if self._is_hub else os.environ["MASTER_ADDR"]
        with suppress(OSError):  # it may have been killed
            self._orders.sendall((json.dumps(told[0] | {"host": host}) + "\n").encode())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watcher:
            if isinstance(error, RuntimeError):
                self._await_verdict(error)
            with suppress(OSError):
                self._orders.sendall(b"leave\n")
            until = time.monotonic() + _LEAVING_S
            while os.waitpid(self._watcher, os.WNOHANG)[0] == 0:
                if time.monotonic() > until:
                    os.kill(self._watcher, signal.SIGKILL)
                time.sleep(0.005)
            self._say_at_the_door()
        self._kept.close()

    def _await_verdict(self, error: RuntimeError) -> None:
        """A collective may have failed since another process was lost: then the watcher says so,
        and ends this one with what failed among its stacks. Otherwise the error goes on."""
        failed = "".join(traceback.format_exception(error))
        os.write(self._stacks.fileno(), f"{failed}\n".encode())
        self._orders.settimeout(_VERDICT_S)
        with suppress(OSError):  # the watcher sends nothing: only its own end is heard
            self._orders.recv(1)
        self._orders.settimeout(None)

    def _say_at_the_door(self) -> None:
        """To those who watch this process in the place of a watcher that has died."""
        self._door.setblocking(False)
        with suppress(OSError):
            while True:
                with self._door.accept()[0] as connection:
                    connection.sendall(b"left\n")

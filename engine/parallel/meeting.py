"""How the processes of a run meet before anything is laid out, in the store of the launcher.

Each leaves what it was started with, or the error that it met before. Rank 0 reads all of it, says
what is wrong in one message, and leaves its verdict, which the others wait for. It answers only
those whose token it has read, so a store of another training is noticed. A process that came with
an error waits `REFUSED_S` for rank 0, then says its own.
The store is asked in a thread of its own: its calls may block for ever, and a signal ends the
process at once. Waiting is bounded by `distributed.rendezvous_s` of each process, counted anew when
rank 0 comes.
Left out: a process lost after the verdict; the watchdog finds it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from carillon.engine.log import logger
from carillon.engine.parallel.place import Place, say
from carillon.engine.parallel.refusals import explained, flat, listed, refusal_of

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
REFUSED_S = 30.0  # that a process with an error waits for rank 0 to tell it
_QUIET_S = 30.0  # of waiting before a line tells for whom
_STAY_S = 15.0  # that rank 0 keeps its store for others to read that they are refused
_SETTLE_S = 3.0  # from the first error to the message: others may have the same
_LAG_S = 5.0  # that others wait longer than rank 0, so that it is the one who tells
_POLL_S = 0.05
_meetings = itertools.count()  # of this process, and so of every other


class _Apart(Exception):
    """The processes do not come together; without a text where another one tells why."""


def meet(
    place: Place, timeout_s: float, settings: Mapping[str, Any], problem: str | None = None
) -> Store:
    """A store for the process group, once all processes came with the same nested settings.

    `problem` is an error that keeps this process from going on. Ends the process (SystemExit with
    code 2), after one of them told why, when there is one or the processes do not come together.
    """
    meeting = _Meeting(place, timeout_s, settings, problem)
    with meeting.ended_by_signals():
        threading.Thread(target=meeting.run, daemon=True, name="meeting").start()
        while not meeting.ended.wait(_POLL_S) and time.monotonic() < meeting.until + _LAG_S:
            pass
    if meeting.agreed is not None:
        return meeting.agreed
    if not meeting.is_told:
        say(problem or meeting.refusal)
    meeting.leave(EXIT_USER_ERROR)


def _end_before_python(ended: threading.Event, code: int) -> None:
    """At exit: a thread that comes back from C++ while Python ends aborts the process ("terminate
    called without an active exception"), so Python does not end while the meeting's may."""
    if ended.is_set():
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Meeting:
    """One process's side; `run` runs in the thread, the rest is read by who waits for it."""

    def __init__(
        self, place: Place, timeout_s: float, settings: Mapping[str, Any], problem: str | None
    ) -> None:
        self.place, self.timeout_s, self.problem = place, timeout_s, problem
        self.until = time.monotonic() + timeout_s
        self.agreed: Store | None = None
        self.is_told = False  # by this process or rank 0, or left to another one
        self.refusal = (
            f"what listens at {place.address}:{place.port} is no training: look that rank 0 runs, "
            f"and take another port (torchrun --master-port) where it does not ({place})"
        )
        self._token = secrets.token_hex(8)
        named = {"WORLD_SIZE": place.size} | dict(flat(settings))
        self._own = {
            "token": self._token,
            "problem": problem,
            "settings": {name: json.dumps(value) for name, value in named.items()},
        }
        self._quiet_until = time.monotonic() + min(_QUIET_S, timeout_s / 2)
        self._poll_s = max(_POLL_S, place.size / 2000)  # thousands do not flood the store
        self.ended = threading.Event()  # not Thread.is_alive: wrong once a signal left a join
        self._prefix = f"carillon/{next(_meetings)}"

    def run(self) -> None:
        """What the thread does."""
        try:
            self.hold()
        finally:
            self.ended.set()

    def hold(self) -> None:
        try:
            store = self._open()
            self._come(store)
            if self.place.rank == 0:
                self._lead(store)
            else:
                self._follow(store)
            self.agreed = store
        except _Apart as reason:
            self.refusal = str(reason)
            if not self.refusal and self.problem is None:
                self.is_told = True
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            self.refusal = explained(str(error).split("\n", 1)[0], self.place)

    def leave(self, code: int) -> NoReturn:
        """End the process, once what is under way in it has been left."""
        # The launcher ends those who are left when the first has gone; all end with the same code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        atexit.register(_end_before_python, self.ended, code)
        raise SystemExit(code)

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Inside nothing is begun, so a signal ends the process; Slurm's asks for another start."""

        def end(number: int, frame: FrameType | None) -> None:
            if self.problem is not None and self.place.rank == 0 and not self.is_told:
                self.is_told = True
                say(self.problem)
            if self.is_told:
                self.leave(EXIT_USER_ERROR)
            self.leave(EXIT_REQUEUE if number == signal.SIGUSR1 else 128 + number)

        before = {kind: signal.signal(kind, end) for kind in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                if signal.getsignal(kind) is not signal.SIG_IGN:
                    signal.signal(kind, handler)

    def _open(self) -> Store:
        # torchrun keeps a store for its processes, at the same address; else rank 0 has it.
        is_host = self.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not is_host:
            self._reach()
        assert self.place.address is not None
        store = TCPStore(
            self.place.address,
            self.place.port,
            self.place.size,
            is_host,
            timeout=timedelta(seconds=self.timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"{self._prefix}/{attempt}", store)

    def _reach(self) -> None:
        """Until someone listens there: torch's own waiting fills the log with stack frames."""
        while True:
            try:
                socket.create_connection((self.place.address, self.place.port), timeout=5).close()
                return
            except OSError as error:
                why = error
            waited = "rank 0" if self.place.rank else "torchrun"
            self._pause(f"{waited} does not answer", f"{explained(str(why), self.place)}")

    def _come(self, store: Store) -> None:
        own = json.dumps(self._own)
        if store.compare_set(_key(self.place.rank), "", own) != own.encode():
            raise _Apart(
                f"another process has come as rank {self.place.rank}: another training uses the "
                f"port, or two processes were started with the same RANK. Take another port "
                f"(torchrun --master-port), or end the other one ({self.place})"
            )

    def _lead(self, store: Store) -> None:
        came: dict[int, Any] = {0: self._own}
        expected = self.place.size - 1
        try:
            if self.problem is None:
                self._gather(store, came)
            refusal = refusal_of(came)
        except _Apart as late:
            refusal, expected = str(late), len(came) - 1
        if refusal is None:
            tokens = [came[rank]["token"] for rank in range(self.place.size)]
            store.set("verdict", json.dumps({"tokens": tokens}))
            return
        if not self.is_told:
            self.is_told = True
            say(refusal)
        store.set("verdict", json.dumps({"tokens": None}))
        self.until = time.monotonic() + _STAY_S
        while store.add("told", 0) < expected and time.monotonic() < self.until:
            time.sleep(self._poll_s)
        raise _Apart

    def _gather(self, store: Store, came: dict[int, Any]) -> None:
        """All who come; once that cannot end well, only those who come soon after."""
        settled: float | None = None
        while True:
            missing = [rank for rank in range(self.place.size) if rank not in came]
            for rank in missing:
                if store.check([_key(rank)]):
                    came[rank] = json.loads(store.get(_key(rank)))
                    if settled is None and refusal_of(came) is not None:
                        settled = time.monotonic() + _SETTLE_S
            missing = [rank for rank in missing if rank not in came]
            if not missing or (settled is not None and time.monotonic() > settled):
                return
            text = f"{listed(missing)} of {self.place.size} have not come"
            self._pause(text, explained(text, self.place, self.timeout_s))

    def _follow(self, store: Store) -> None:
        has_come = False
        while not store.check(["verdict"]):
            if not has_come and store.check([_key(0)]):
                has_come = True
                if self.problem is None:  # from here on rank 0 counts, and tells
                    self.until = time.monotonic() + self.timeout_s + _LAG_S
            if has_come:
                self._pause("", f"rank 0 came and has not answered ({self.place})")
            else:
                self._pause_without_lead(store)
        tokens = json.loads(store.get("verdict"))["tokens"]
        if tokens is None:
            self.is_told = True
            store.add("told", 1)
            raise _Apart
        if self.place.rank >= len(tokens) or tokens[self.place.rank] != self._token:
            raise _Apart(
                "the rank 0 that answers has not read this process: another training uses the "
                f"port, or WORLD_SIZE differs. Take another port (torchrun --master-port), and "
                f"start all processes by the same command ({self.place})"
            )

    def _pause_without_lead(self, store: Store) -> None:
        """The lowest rank that came says who is missing."""
        text = ""
        if time.monotonic() > min(self._quiet_until, self.until):
            missing = [rank for rank in range(self.place.size) if not store.check([_key(rank)])]
            if set(range(self.place.rank)) <= set(missing):
                text = f"{listed(missing)} of {self.place.size} have not come"
        self._pause(text, text and explained(text, self.place, self.timeout_s))

    def _pause(self, waiting: str, refusal: str) -> None:
        """A moment; after a while a line that tells for what, and in the end the refusal."""
        now = time.monotonic()
        if now > self.until:
            raise _Apart(refusal)
        if now > self._quiet_until and self.problem is None:
            self._quiet_until = self.until
            if waiting:
                left = self.until - now
                logger.warning("%s; waiting %.0f s more (%s)", waiting, left, self.place)
        time.sleep(self._poll_s)


def _key(rank: int) -> str:
    return f"rank/{rank}"

"""Loads many items at a time and gives the results in the order of their source.

A window of items is under way: bounded in number and in bytes, so memory is flat and a slow item
holds up the results behind it, not the loading. Of each host so many are fetched at a time, and so
many are started a second; the window looks past a busy host for others.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

from carillon.engine.data.ingest_items import Entry, Item, Rejected, Url
from carillon.engine.data.ingest_loading import Loaded, host_of


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How much is under way at a time."""

    connections: int = 32
    per_host: int = 8
    per_host_per_s: float = 10.0
    window_items: int = 4096
    window_bytes: int = 512 << 20


@dataclass(eq=False)
class Slot:
    """An entry in the window, with its result once there is one."""

    entry: Entry
    result: Loaded | str | None = None
    num_bytes: int = 0


@dataclass(eq=False)
class _Host:
    waiting: deque[Slot] = field(default_factory=deque)
    running: int = 0
    next_start_s: float = 0.0
    is_queued: bool = False


class HostGate:
    """Which waiting items may start: of a host so many at a time, and so many a second."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._hosts: dict[str, _Host] = {}
        self._free: deque[Slot] = deque()
        self._queue: list[tuple[float, int, str]] = []
        self._order = count()

    def add(self, slot: Slot) -> None:
        host = _host(slot)
        if host is None:
            self._free.append(slot)
            return
        state = self._hosts.setdefault(host, _Host())
        state.waiting.append(slot)
        self._enqueue(host, state)

    def start(self, now_s: float) -> Slot | None:
        """The next item that may start now."""
        if self._free:
            return self._free.popleft()
        if not self._queue or self._queue[0][0] > now_s:
            return None
        _, _, host = heapq.heappop(self._queue)
        state = self._hosts[host]
        state.is_queued = False
        state.running += 1
        state.next_start_s = now_s + 1 / self._pace.per_host_per_s
        slot = state.waiting.popleft()
        self._enqueue(host, state)
        return slot

    def end(self, slot: Slot) -> None:
        """An item that started is done."""
        host = _host(slot)
        if host is None:
            return
        state = self._hosts[host]
        state.running -= 1
        if state.waiting:
            self._enqueue(host, state)
        elif not state.running and len(self._hosts) > self._pace.window_items:
            del self._hosts[host]

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until another item may start; none when that takes an end."""
        if self._free:
            return 0.0
        return max(self._queue[0][0] - now_s, 0.0) if self._queue else None

    def _enqueue(self, host: str, state: _Host) -> None:
        if state.waiting and not state.is_queued and state.running < self._pace.per_host:
            state.is_queued = True
            heapq.heappush(self._queue, (state.next_start_s, next(self._order), host))


def _host(slot: Slot) -> str | None:
    if isinstance(slot.entry, Item):
        for where in slot.entry.members.values():
            if isinstance(where, Url):
                return host_of(where.url)
    return None


def in_order(
    entries: Iterator[Entry], load: Callable[[Item], Loaded | str], pace: Pace
) -> Generator[tuple[Entry, Loaded | str], None, None]:
    """Each entry with what `load` made of it, or the reason why there is nothing."""
    executor = ThreadPoolExecutor(pace.connections, thread_name_prefix="ingest")
    try:
        yield from _Window(load, pace, executor).results(entries)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class _Window:
    def __init__(
        self, load: Callable[[Item], Loaded | str], pace: Pace, executor: ThreadPoolExecutor
    ) -> None:
        self._load, self._pace, self._executor = load, pace, executor
        self._gate = HostGate(pace)
        self._slots: deque[Slot] = deque()
        self._done: queue.SimpleQueue[tuple[Slot, Loaded | str | BaseException]]
        self._done = queue.SimpleQueue()
        self._num_running = self._num_bytes = 0

    def results(self, entries: Iterator[Entry]) -> Iterator[tuple[Entry, Loaded | str]]:
        more = True
        while True:
            more = more and self._fill(entries)
            self._start()
            if not self._slots:
                return
            if self._slots[0].result is None:
                self._wait()
                continue
            slot = self._slots.popleft()
            self._num_bytes -= slot.num_bytes
            assert slot.result is not None
            yield slot.entry, slot.result

    def _fill(self, entries: Iterator[Entry]) -> bool:
        """Fill the window; whether there is more."""
        pace = self._pace
        while len(self._slots) < pace.window_items and (
            not self._slots or self._num_bytes < pace.window_bytes
        ):
            entry = next(entries, None)
            if entry is None:
                return False
            slot = Slot(entry)
            self._slots.append(slot)
            if isinstance(entry, Rejected):
                slot.result = entry.reason
                continue
            slot.num_bytes = entry.inline_bytes
            self._num_bytes += slot.num_bytes
            self._gate.add(slot)
            self._collect()
            self._start()
        return True

    def _start(self) -> None:
        # As few wait in the pool as can be: what has started cannot be overtaken.
        while self._num_running < self._pace.connections:
            slot = self._gate.start(time.monotonic())
            if slot is None:
                return
            self._num_running += 1
            self._executor.submit(self._run, slot)

    def _run(self, slot: Slot) -> None:
        try:
            assert isinstance(slot.entry, Item)
            self._done.put((slot, self._load(slot.entry)))
        except BaseException as error:
            self._done.put((slot, error))

    def _wait(self) -> None:
        """Until an item is done, or another may start."""
        timeout = None
        if self._num_running < self._pace.connections:
            timeout = self._gate.wait_s(time.monotonic())
        with contextlib.suppress(queue.Empty):
            self._finish(*self._done.get(timeout=timeout))
        self._collect()

    def _collect(self) -> None:
        """Take what is done by now."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._finish(*self._done.get_nowait())

    def _finish(self, slot: Slot, result: Loaded | str | BaseException) -> None:
        self._num_running -= 1
        self._gate.end(slot)
        if isinstance(result, BaseException):
            raise result
        held = 0 if isinstance(result, str) else sum(map(len, result.members.values()))
        self._num_bytes += held - slot.num_bytes
        slot.num_bytes, slot.result = held, result

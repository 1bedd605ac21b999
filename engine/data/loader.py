"""Positions in, batches out: the training loader.

The dataset maps global positions to a batch, purely. Workers are therefore stateless, the loader's
whole state is the next position and what was counted, and any world size, worker count or restart
yields the same stream. Where streams fill packs, a batch says where they stand after it; that is
part of the state, and a stream is always served by the same worker.
Workers that die or hang are replaced by others that start where the training stands: no sample is
lost or doubled. The sample that a worker was lost at is decoded in a process of its own then; if a
second worker is lost at it, it is set aside for the rest of the run and another stands in for it.
Once the share of bad samples passes `max_bad_share` the run stops.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Generic

import torch

from carillon.engine.choices import divisors
from carillon.engine.config import UserError
from carillon.engine.data.ahead import Copied, ahead
from carillon.engine.data.packing import StreamState
from carillon.engine.data.positioned import B, Positioned
from carillon.engine.data.stages import StageBoard
from carillon.engine.data.training_data import Place
from carillon.engine.data.workers import LostWorkers, Workers

_MIN_JUDGED = 200  # samples read, bad ones included, before max_bad_share is judged
_MAX_LOST = 6  # in a row without a batch: what ends them is no sample
_REPORT_EVERY_S = 60.0
_REPORTED_SHARE = 0.1

logger = logging.getLogger("carillon")


class _LocalPositions:
    """Positions of this process's contiguous share of each global batch, without end."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size = start, batch_size
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.offset
        while True:
            yield list(range(first, first + self.share))
            first += self.batch_size


class TrainingLoader(Generic[B]):
    """Batches of this process from `position` on; its state is that position and the counts."""

    def __init__(
        self, samples: Positioned[B], *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.samples, self.rank, self.world_size = samples, rank, world_size
        self._device = device
        self.position = 0
        self.num_read = 0
        self.num_bad = 0
        self.num_filtered = 0
        self.streams: dict[int, StreamState] = {}  # of this process
        self.read_up_to = 0  # when its state was loaded: nothing was read at or past this place
        self._newest: Copied[B] | None = None

    @property
    def num_workers(self) -> int:
        """Those asked for, or with streams the most of them that take turns as the streams do."""
        asked, turns = self.samples.config.num_workers, self.samples.turns
        if turns is None:
            return asked
        return max((number for number in divisors(turns) if number <= asked), default=0)

    def __iter__(self) -> Generator[B, None, None]:
        """Batches without end; close it, or its workers outlive an error that keeps its frame."""
        with closing(_Source(self)) as source:
            stalls = _Stalls(source, self.num_workers)
            with closing(source.copied(self._device)) as batches:
                while True:
                    started = time.monotonic()
                    self._newest = next(batches)
                    stalls.waited(time.monotonic() - started)
                    self._count(self._newest.host)
                    yield self._newest.host

    def on_device(self) -> B:
        """The newest batch on the device, for the current stream."""
        assert self._newest is not None, "a batch comes first"
        return self._newest.wait()

    def suspect(self, lost: LostWorkers) -> None:
        """The samples that the workers were at: suspects, and out when they were that before."""
        for sample in lost.samples:
            place = Place(*sample)
            if place not in self.samples.suspects:
                self.samples.suspects.add(place)
            else:
                self.samples.aside.add(place)
                key = self.samples.data.key(place)
                logger.error("sample %s is set aside: loader processes end at it (%s)", key, lost)

    def check_bad_share(self, *, num_bad: int, num_read: int, num_filtered: int = 0) -> None:
        """Raise UserError once the run's bad share passes the limit; judged from 200 reads on.

        Filtered samples were read and are sound: damage that the search for the few that qualify
        comes across is no larger a share than it is of the set.
        """
        limit = self.samples.config.max_bad_share
        total = num_read + num_filtered + num_bad
        if total >= _MIN_JUDGED and num_bad > limit * total:
            raise UserError(
                f"{num_bad} of {total} samples read are bad, more than "
                f"data.max_bad_share={limit:g}; see the log for keys and reasons"
            )

    def counts(self) -> dict[str, int]:
        """What this process read so far: samples used, bad ones and filtered ones."""
        return {
            "num_read": self.num_read,
            "num_bad": self.num_bad,
            "num_filtered": self.num_filtered,
        }

    def state_dict(self) -> dict[str, Any]:
        """Of this process; `state_of_all` makes one of several."""
        streams = {str(n): [s.packs, s.read, *s.waiting] for n, s in sorted(self.streams.items())}
        aside = sorted(self.samples.aside)
        return {"position": self.position, **self.counts(), "streams": streams, "aside": aside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of any number of processes; each takes up the streams that are its own now."""
        streams = {
            int(number): StreamState(packs, read, tuple(waiting))
            for number, (packs, read, *waiting) in state["streams"].items()
        }
        batch_size = self.samples.config.batch_size
        share = batch_size // self.world_size
        self.streams = {n: s for n, s in streams.items() if n % batch_size // share == self.rank}
        self.position = int(state["position"])
        self.num_read, self.num_bad = int(state["num_read"]), int(state["num_bad"])
        self.num_filtered = int(state["num_filtered"])
        self.samples.aside |= {Place(*place) for place in state["aside"]}
        furthest = max((stream.read for stream in streams.values()), default=0)
        self.read_up_to = furthest * self.samples.num_streams if streams else self.position

    def start_workers(
        self, board: StageBoard, position: int, streams: Mapping[int, StreamState]
    ) -> Workers:
        """Workers whose first batch is that of a position, where the streams stand so."""
        config = self.samples.config
        self.samples.start(streams, board)
        return Workers(
            self.samples,
            _LocalPositions(position, config.batch_size, self.rank, self.world_size),
            board=board,
            num=self.num_workers,
            prefetch=config.prefetch_batches,
            pin=self._device.type == "cuda",
            timeout_s=config.worker_timeout_s,
        )

    def _count(self, batch: B) -> None:
        self.position += self.samples.config.batch_size
        self.num_read += len(batch.keys)
        self.num_bad += len(batch.bad)
        self.num_filtered += batch.num_filtered
        self.streams.update(batch.streams)


class _Source(Generic[B]):
    """The batches of a loader, by workers that are replaced when they are lost."""

    def __init__(self, loader: TrainingLoader[B]) -> None:
        self._loader, self._position = loader, loader.position
        self._streams = dict(loader.streams)  # as the newest batch left them, taken or not
        self._lost = 0
        self._start()

    def copied(self, device: torch.device) -> Generator[Copied[B], None, None]:
        """Batches with their copies on the device; on a GPU ahead of their use."""
        if device.type == "cuda":
            yield from ahead(self.next, lambda batch: batch.to(device), device)
        while True:
            batch = self.next()
            yield Copied(batch, batch.to(device), None)

    def next(self) -> B:
        """The next batch; raises UserError where one cannot be made."""
        while True:
            try:
                batch: B | UserError = self._workers.next()
            except LostWorkers as lost:
                self._replace(lost)
                continue
            if isinstance(batch, UserError):
                raise batch
            self._lost = 0
            self._position += self._loader.samples.config.batch_size
            self._streams.update(batch.streams)
            return batch

    def take_seconds(self) -> dict[str, float]:
        """Of the workers, by stage, since the last call."""
        return self._board.take_seconds()

    def close(self) -> None:
        self._workers.close()

    def _start(self) -> None:
        self._board = StageBoard(self._loader.num_workers)
        self._workers = self._loader.start_workers(self._board, self._position, self._streams)

    def _replace(self, lost: LostWorkers) -> None:
        self._workers.close()
        self._lost += 1
        if self._lost == _MAX_LOST:
            raise UserError(
                f"loader processes were lost {self._lost} times in a row without a batch, at last: "
                f"{lost}. Code -9 is often a lack of memory: use fewer data.num_workers"
            ) from None
        logger.warning("%s; other loader processes take their place", lost)
        self._loader.suspect(lost)
        self._start()


class _Stalls:
    """Tells when the training waits for data, and for which stage of it."""

    def __init__(self, source: _Source[Any], num_workers: int) -> None:
        self._source, self._num_workers = source, num_workers
        self._waited_s, self._since = 0.0, 0.0

    def waited(self, seconds: float) -> None:
        now = time.monotonic()
        if not self._since:  # the first batch is a start, no stall
            self._since = now
            return
        self._waited_s += seconds
        if now - self._since < _REPORT_EVERY_S:
            return
        share = self._waited_s / (now - self._since)
        spent = self._source.take_seconds()
        if share > _REPORTED_SHARE:
            logger.warning("%s", stall_report(share, spent, self._num_workers))
        self._waited_s, self._since = 0.0, now


def stall_report(share: float, spent: Mapping[str, float], num_workers: int) -> str:
    """What to tell of a training that waits for its data: by how much, for what, and what helps."""
    busy = {name: seconds for name, seconds in spent.items() if name != "idle"}
    total = sum(busy.values()) or 1.0
    slowest = max(busy, key=lambda name: busy[name])
    shares = ", ".join(f"{name} {100 * seconds / total:.0f}%" for name, seconds in busy.items())
    advice = "raise data.num_workers"
    if not num_workers:
        advice = "data.num_workers=0 loads in the training process: raise it"
    elif slowest == "read":
        advice += ", or read runs of rows (data.shuffle.block_rows), or copy the set nearer"
    return f"training waits for data {100 * share:.0f}% of the time; loading is {shares}; {advice}"


def state_of_all(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a loader, of those of all its processes."""
    counts = ("num_read", "num_bad", "num_filtered")
    return {
        **states[0],
        **{name: sum(state[name] for state in states) for name in counts},
        "streams": {number: s for state in states for number, s in state["streams"].items()},
        "aside": sorted({tuple(place) for state in states for place in state["aside"]}),
    }

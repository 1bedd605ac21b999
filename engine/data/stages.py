"""What each loader worker is doing, written where the training process can see it.

A row of shared memory per worker: the stage that it is in and since when, the sample that it is at,
and the seconds that it spent in each stage. A worker writes, the training process reads, without a
lock: a value is one aligned word. So it is known which stage starves the training, and which sample
a worker died of, without asking the worker.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STAGES = ("idle", "order", "read", "decode", "transform", "collate")
_FIELDS = ("pid", "stage", "since", "set", "row")


class Doing(NamedTuple):
    """What a worker is at: the stage, for how long, and the sample (set and row), if any."""

    stage: str
    seconds: float
    sample: tuple[int, int] | None


class StageBoard:
    """Rows for `num_workers` processes (at least one) that are forked after it is made."""

    def __init__(self, num_workers: int) -> None:
        width = len(_FIELDS) + len(STAGES)
        num = max(num_workers, 1)
        self._memory = mmap.mmap(-1, num * width * 8)  # anonymous and shared with forked children
        self._rows: NDArray[np.float64] = np.frombuffer(self._memory).reshape(num, width)
        self._rows[:] = 0
        self._rows[:, 3:5] = -1
        self._own = self._rows[0]
        self._taken = np.zeros(len(STAGES))

    def enter(self, worker: int) -> None:
        """In a worker: its row from now on."""
        self._own = self._rows[worker]
        self._own[0], self._own[2] = os.getpid(), time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent inside counts as that stage's; afterwards the one before goes on."""
        before = self._switch(STAGES.index(name))
        try:
            yield
        finally:
            self._switch(before)

    def at(self, sample: tuple[int, int] | None) -> None:
        """The sample that is worked on from here."""
        self._own[3:5] = sample if sample is not None else (-1, -1)

    def doing(self, worker: int) -> Doing:
        """What a worker is at now."""
        row = self._rows[worker]
        sample = (int(row[3]), int(row[4])) if row[3] >= 0 else None
        return Doing(STAGES[int(row[1])], max(0.0, time.monotonic() - float(row[2])), sample)

    def pid(self, worker: int) -> int:
        """The worker's process; 0 until it has started."""
        return int(self._rows[worker, 0])

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each stage since the last call, over all workers."""
        total = self._rows[:, len(_FIELDS) :].sum(axis=0)
        since, self._taken = total - self._taken, total
        return dict(zip(STAGES, since.tolist(), strict=True))

    def _switch(self, stage: int) -> int:
        own, now = self._own, time.monotonic()
        before = int(own[1])
        own[len(_FIELDS) + before] += now - own[2]
        own[1], own[2] = stage, now
        return before

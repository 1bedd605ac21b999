"""The loader's processes: batches in order, and what a worker that died or hangs was at.

torch's DataLoader moves the batches; this file looks after its processes. A worker that was killed
or does not deliver in time is not the end of a run: `next` raises LostWorkers, and since batches
follow from their positions the caller starts others where it stands. torch would raise from a
signal handler in the middle of a training step: that is taken out, and it looks for the dead.
Left out: a message that is torn as its writer dies; the watchdog of the ranks sees such a stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from carillon.engine.data.stages import StageBoard

_DYING_S = 2.0  # a process whose connection is gone is gone itself soon
_LOOK_EVERY_S = 5.0  # for workers that are late; torch looks for dead ones as often


class LostWorkers(Exception):
    """Workers that died or hang; `samples` are those (set, row) that they were at."""

    def __init__(self, reason: str, samples: list[tuple[int, int]]) -> None:
        super().__init__(reason)
        self.samples = samples


class Workers:
    """Batches of `positions` by `num` forked processes, or by this one where `num` is 0."""

    def __init__(
        self,
        samples: Dataset[Any],
        positions: Iterable[list[int]],
        *,
        board: StageBoard,
        num: int,
        prefetch: int,
        pin: bool,
        timeout_s: float,
    ) -> None:
        self._board, self._num, self._timeout_s, self._given = board, num, timeout_s, 0
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=positions,
            num_workers=num,
            prefetch_factor=prefetch if num else None,
            collate_fn=_as_it_is,
            pin_memory=pin,
            worker_init_fn=_WorkerStart(board),
            multiprocessing_context="fork" if num else None,
            timeout=_LOOK_EVERY_S if num else 0,
        )
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if main else None
        self._batches: Iterator[Any] = iter(loader)
        if main:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def next(self) -> Any:
        """The next batch. Raises LostWorkers, after which only `close` may be called."""
        since = time.monotonic()
        while True:
            try:
                batch = next(self._batches)
            except (ConnectionError, EOFError, FileNotFoundError):
                if not self._dead(_DYING_S):  # it comes from the samples
                    raise
                raise self._died() from None  # between a batch's message and its tensors
            except RuntimeError as error:  # torch has no kinds of its own for these two
                if self._num and "exited unexpectedly" in str(error):
                    raise self._died() from None
                if not self._num or "timed out after" not in str(error):
                    raise
                if time.monotonic() - since > self._timeout_s:
                    raise self._hangs() from None
            else:
                self._given += 1
                return batch

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for worker in range(self._num):
            pid = self._board.pid(worker)
            if pid:  # else it has not started, and ends by itself
                _kill(pid)
        self._batches = iter(())

    def _died(self) -> LostWorkers:
        told, samples = [], []
        for number, code in self._dead(0).items():
            doing = self._board.doing(number)
            told.append(f"worker {number} ended with code {code} ({doing.stage})")
            samples += [doing.sample] if doing.sample else []
        return LostWorkers(", ".join(told) or "a worker ended", samples)

    def _dead(self, within_s: float) -> dict[int, int]:
        """Exit codes of the workers that have ended, or the first that ends within a time."""
        workers = dict(enumerate(getattr(self._batches, "_workers", ())))
        wait([process.sentinel for process in workers.values()], within_s)
        return {n: process.exitcode for n, process in workers.items() if not process.is_alive()}

    def _hangs(self) -> LostWorkers:
        late = self._given % self._num  # torch asks the workers in turn
        doing = self._board.doing(late)
        told = f"worker {late} has been at one stage ({doing.stage}) for {doing.seconds:.0f} s"
        return LostWorkers(told, [doing.sample] if doing.sample else [])


class _WorkerStart:
    """Called in each worker as it starts."""

    def __init__(self, board: StageBoard) -> None:
        self._board = board

    def __call__(self, worker: int) -> None:
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(kind, signal.SIG_IGN)  # the training process decides when to end
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
        self._board.enter(worker)


def _as_it_is(batch: Any) -> Any:
    return batch


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

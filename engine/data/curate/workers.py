"""Processes that score parts, and someone who watches them.

Each worker takes a part at a time, tells which row it begins in shared memory, and writes the
part's table itself. When a worker dies (a decoder crashed, the system was out of memory) or stays
at one row for too long, that row is quarantined, and a new worker takes the part. A pool of
concurrent.futures would lose all that is under way and not say where. Workers have a limit of
memory (RLIMIT_DATA) and end when their parent does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from carillon.engine.config import UserError
from carillon.engine.data.curate.pipeline import Pipeline
from carillon.engine.data.curate.score import Part, score_part
from carillon.engine.data.curate.state import skip_row, skipped_rows, table_path, write_table
from carillon.engine.data.shards import open_dataset

_POLL_S = 0.5
_IDLE_ROW = -1.0
_MAX_DEATHS_OUTSIDE = 2
_MAX_DEATHS_AT_ROW = 2


class Job(NamedTuple):
    """All that a worker must know; paths, so that it can be sent anywhere."""

    pipeline: Pipeline
    sources: tuple[str | tuple[str, ...], ...]
    num_datasets: int  # the sources after these are evaluation sets
    folder: Path
    memory_limit_bytes: int


class _Worker:
    """One process, with the part that it is at."""

    def __init__(self, job: Job) -> None:
        context = get_context("spawn")
        self.progress = context.RawArray("d", [_IDLE_ROW, 0.0])  # row, when it was begun
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(job, theirs, self.progress), daemon=True
        )
        self.process.start()
        theirs.close()
        self.part: Part | None = None
        self.was_late = False

    def give(self, part: Part, skip: dict[int, str]) -> None:
        self.part = part
        self.progress[0] = _IDLE_ROW
        with contextlib.suppress(OSError):  # it died since: seen by its sentinel
            self.connection.send((part, skip))

    def stuck_for_s(self) -> float:
        row, begun = self.progress[:]
        return time.monotonic() - begun if self.part and row != _IDLE_ROW else 0.0

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Crew:
    """Workers that live as long as the crew, and take parts until `end`."""

    def __init__(self, job: Job, *, workers: int) -> None:
        self._job = job
        self._workers = [_Worker(job) for _ in range(workers)]
        self._deaths_outside = 0
        self._deaths_at: Counter[tuple[int, int]] = Counter()  # by part and row

    def score(self, parts: Sequence[Part], *, done: Callable[[Part], None]) -> None:
        """Score parts; `done` is told of each. Raises UserError for a bad shard or disk."""
        waiting = deque(parts)
        while waiting or any(worker.part for worker in self._workers):
            for worker in self._workers:
                if worker.part is None and waiting:
                    part = waiting.popleft()
                    worker.give(part, skipped_rows(self._job.folder, part))
            for worker in _ready(self._workers):
                if worker.connection.poll() and (said := _received(worker)) is not None:
                    if isinstance(said, Exception):
                        raise said
                    worker.part = None
                    done(said)
                elif not worker.process.is_alive():
                    self._replace(worker, waiting)
            for worker in self._workers:
                if worker.stuck_for_s() > self._job.pipeline.item_timeout_s:
                    worker.was_late = True
                    worker.process.kill()

    def end(self) -> None:
        """End all processes, whatever they are at."""
        for worker in self._workers:
            worker.end()

    def _replace(self, worker: _Worker, waiting: deque[Part]) -> None:
        """Let another go on where a worker died, without the row if it is the row's fault."""
        worker.process.join()
        worker.connection.close()
        part, row, code = worker.part, worker.progress[0], worker.process.exitcode
        if part is not None:
            waiting.appendleft(part)
        if part is None or row == _IDLE_ROW:
            self._deaths_outside += 1
            if self._deaths_outside > _MAX_DEATHS_OUTSIDE:
                raise UserError(f"workers end with code {code} before they read an item")
        elif worker.was_late:
            reason = "it took longer than item_timeout_s, so it is not read again"
            skip_row(self._job.folder, part, int(row), reason)
        else:
            self._deaths_at[part.number, int(row)] += 1
            if self._deaths_at[part.number, int(row)] >= _MAX_DEATHS_AT_ROW:
                reason = f"two processes that read it ended, the last with code {code}"
                skip_row(self._job.folder, part, int(row), reason)
        self._workers[self._workers.index(worker)] = _Worker(self._job)


def score_parts(
    job: Job, parts: Sequence[Part], *, workers: int, done: Callable[[Part], None]
) -> None:
    """Score parts by at most `workers` processes of this machine. Raises UserError."""
    crew = Crew(job, workers=min(workers, len(parts)))
    try:
        crew.score(parts, done=done)
    finally:
        crew.end()


def _ready(crew: Sequence[_Worker]) -> Iterator[_Worker]:
    """Workers that said something or ended."""
    by_handle: dict[Any, _Worker] = {worker.connection: worker for worker in crew}
    by_handle |= {worker.process.sentinel: worker for worker in crew}
    found = wait(list(by_handle), timeout=_POLL_S)
    seen = {id(by_handle[handle]): by_handle[handle] for handle in found}
    yield from seen.values()


def _received(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return None


def _serve(job: Job, connection: Connection, progress: Any) -> None:
    """A worker's life: parts in, tables on disk, until the parent hangs up."""
    _limit_memory(job.memory_limit_bytes)
    datasets: dict[int, Any] = {}
    parent = os.getppid()

    def began(row: int) -> None:
        if os.getppid() != parent:  # it was killed: another run may be at this part
            os._exit(0)
        progress[1] = time.monotonic()
        progress[0] = float(row)

    while True:
        try:
            part, skip = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            if part.source not in datasets:
                datasets[part.source] = open_dataset(_path(job.sources[part.source]))
            table = score_part(
                datasets[part.source].splits[part.split],
                part,
                job.pipeline.stages,
                skip=skip,
                began=began,
                only_signatures=part.source >= job.num_datasets,
            )
            progress[0] = _IDLE_ROW
            write_table(table_path(job.folder, part), table)
            _say(connection, part)
        except KeyboardInterrupt:
            return
        except UserError as error:
            _say(connection, error)
        except Exception:  # told to the parent, which ends the run; a traceback can be sent
            _say(connection, RuntimeError(traceback.format_exc()))


def _say(connection: Connection, what: Part | Exception) -> None:
    with contextlib.suppress(OSError):  # a parent that was killed hears nothing
        connection.send(what)


def _path(source: str | tuple[str, ...]) -> str | list[str]:
    return source if isinstance(source, str) else list(source)


def _limit_memory(limit_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

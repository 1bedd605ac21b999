"""Map a function over items in other processes: results in order, few of them in flight.

`ProcessPoolExecutor.map` submits everything at once, so a slow consumer lets results pile up. Here
at most four chunks a worker are under way. One worker means no pool at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 32
_CHUNKS_PER_WORKER = 4


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """`map`, by `workers` spawned processes; `function` and items must be picklable."""
    if workers == 1:
        yield from map(function, items)
        return
    pending: deque[Future[list[Result]]] = deque()
    remaining = iter(items)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            while True:
                while len(pending) < workers * _CHUNKS_PER_WORKER:
                    chunk = list(islice(remaining, _CHUNK))
                    if not chunk:
                        break
                    pending.append(pool.submit(_apply, function, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _apply(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]

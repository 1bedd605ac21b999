"""The share of a step in which a process does nothing but communicate, by profiling one step.

Collectives stand in torch.profiler's events: on a CPU as gloo's, from issue to end; on CUDA as
NCCL's kernels. What runs beside them in the same time (operators on a CPU, other kernels on CUDA)
hides them; the rest is exposed, and includes waiting for a slower process. Only the main rank
profiles, so the share is its own. Trade-off: a profiled step is slower, most of all in many small
operators, so few are, and the profiler's own start and end are left out of the rates.
Left out: the host's part in issuing a collective (it counts as compute, as all else does), copies
between host and device, and the wait of the loader for its data, which `data_share` has.
Status: the CUDA branch has not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


class CommunicationProbe:
    """Profiles what runs inside `with`: `share` and `overhead_s` are known after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
        self._profile: Any = profile(activities=kinds, acc_events=True)
        self.share = 0.0
        self.overhead_s = 0.0

    def __enter__(self) -> CommunicationProbe:
        began = time.perf_counter()
        self._profile.__enter__()
        self._since = time.perf_counter()
        self.overhead_s = self._since - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda" and error is None:
            torch.cuda.synchronize(self._device)
        ended = time.perf_counter()
        self._profile.__exit__(kind, error, trace)
        if error is None:
            on_cuda = self._device.type == "cuda"
            collectives, work = (of_cuda if on_cuda else of_cpu)(list(self._profile.events() or ()))
            self.share = 1e-6 * exposed(collectives, work) / (ended - self._since)
        self.overhead_s += time.perf_counter() - ended


def of_cpu(events: list[Any]) -> tuple[list[Interval], list[Interval]]:
    """Intervals of gloo's collectives and of operators, in microseconds.

    An operator on a split tensor holds a collective and the wait for it: its parts count instead.
    """
    holders: set[int] = set()
    for event in events:
        parent = event.cpu_parent if "c10d" in event.name else None
        while parent is not None:
            holders.add(id(parent))
            parent = parent.cpu_parent
    collectives = [_interval(event) for event in events if event.name.startswith("gloo:")]
    operators = [e for e in events if e.name.startswith("aten::") and id(e) not in holders]
    return collectives, [_interval(event) for event in operators]


def of_cuda(events: list[Any]) -> tuple[list[Interval], list[Interval]]:
    """Intervals of NCCL's kernels and of all others, in microseconds."""
    kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
    collectives = [_interval(e) for e in kernels if e.name.startswith("nccl")]
    return collectives, [_interval(e) for e in kernels if not e.name.startswith("nccl")]


def exposed(collectives: Iterable[Interval], work: Iterable[Interval]) -> float:
    """How long some collective ran and no work did."""
    busy = list(_merged(work))
    return _length(_merged([*collectives, *busy])) - _length(busy)


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _merged(intervals: Iterable[Interval]) -> Iterator[Interval]:
    """The same stretches of time, in order and none twice."""
    last: Interval | None = None
    for begin, end in sorted(intervals):
        if last is not None and begin <= last[1]:
            last = (last[0], max(last[1], end))
            continue
        if last is not None:
            yield last
        last = (begin, end)
    if last is not None:
        yield last


def _interval(event: Any) -> Interval:
    return event.time_range.start, event.time_range.end

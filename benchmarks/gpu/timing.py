"""Time and memory of a call, by CUDA events on a GPU and by the clock elsewhere.

Before each call the second-level cache is overwritten, so that inputs come from memory as they do
in training; that also keeps the GPU busy while the call's launches are queued. Warm-up calls come
first: compilation, handles and the allocator's first growth are no part of a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

WARM_UPS = 2
LEAST_ROUNDS = 3


class Timing(NamedTuple):
    """Milliseconds of a call: median, the tenth and ninetieth percentile, and the time that the
    processor took to launch it (where that is the larger one, the GPU waited)."""

    median_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    rounds: int


class Memory(NamedTuple):
    """MiB that a call takes beside its inputs, and the most that was allocated in all."""

    extra_mb: float
    peak_mb: float


def time_call(
    call: Callable[[], Any], device: str, *, most_s: float, most_rounds: int = 100
) -> Timing:
    """Calls it as often as `most_s` allows, LEAST_ROUNDS times at least, `most_rounds` at most."""
    once = _Cuda() if device.startswith("cuda") else _Clock()
    began = time.perf_counter()
    warm_ups = min(WARM_UPS, most_rounds - 1)
    for _ in range(warm_ups):
        once.measure(call)
    each_s = (time.perf_counter() - began) / max(warm_ups, 1)
    rounds = min(most_rounds, max(LEAST_ROUNDS, int(most_s / max(each_s, 1e-6))))
    taken = [once.measure(call) for _ in range(rounds)]
    device_ms = sorted(ms for ms, _ in taken)
    return Timing(
        median_ms=statistics.median(device_ms),
        low_ms=device_ms[int(0.1 * (rounds - 1))],
        high_ms=device_ms[round(0.9 * (rounds - 1))],
        host_ms=statistics.median(ms for _, ms in taken),
        rounds=rounds,
    )


def memory_of(call: Callable[[], Any], device: str) -> Memory | None:
    """Of one call; not known on the CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return Memory(extra_mb=(peak - before) / 2**20, peak_mb=peak / 2**20)


class _Cuda:
    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._cover = torch.empty(4 * cache_bytes, dtype=torch.uint8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def measure(self, call: Callable[[], Any]) -> tuple[float, float]:
        begin, end = self._events
        self._cover.zero_()
        begin.record()
        began = time.perf_counter()
        call()
        host_ms = 1e3 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), host_ms


class _Clock:
    def measure(self, call: Callable[[], Any]) -> tuple[float, float]:
        began = time.perf_counter()
        call()
        taken_ms = 1e3 * (time.perf_counter() - began)
        return taken_ms, taken_ms

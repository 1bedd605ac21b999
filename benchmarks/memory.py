"""Extra memory of a call: how far the process's peak grows over what was resident before it.

Memory that the allocator keeps of earlier calls is given back first, so that it counts. What a call
before left behind on purpose (compiled code, a library's buffers) does not count. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def extra_mb(call: Callable[[], object]) -> float:
    """In MiB, results included."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status_kb("VmRSS")
    call()
    return max(0, _status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")

"""SIGKILL for everything that a launch started: agent, ranks, loader workers.

Ranks of torchrun lead sessions of their own, so no one process group holds them all, and a worker
forked while the kill is under way is found by its session. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill `process` and all that it started; returns once none is left."""
    known = {process.pid}
    while living := descendants(known):
        known |= living
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
    process.wait()


def descendants(pids: set[int]) -> set[int]:
    """Those of `pids` that live, all below them, and all in sessions that any of these leads."""
    table = _parents_and_sessions()
    found = set(pids)
    while True:
        more = {p for p, (parent, session) in table.items() if parent in found or session in found}
        if more <= found:
            return found & table.keys()
        found |= more


def _parents_and_sessions() -> dict[int, tuple[int, int]]:
    table = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended in the meantime
            state, parent, _, session = entry.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                table[int(entry.parent.name)] = (int(parent), int(session))
    return table

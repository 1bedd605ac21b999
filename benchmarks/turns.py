"""Two or more training processes that take turns on one machine.

Each runs as its own process group (workers included) and stands still (SIGSTOP) while another has
its turn, so all of them meet the same machine within seconds of each other, with caches, threads
and prefetched batches as in an undisturbed run. A turn is a number of lines that the process
appends to a file, one each few steps; it ends as soon as the line is there. Each computes in one
thread, beside which its loader worker has the second core of a small machine: with more threads
than free cores an operator waits for its slowest one, and a busy machine measures its scheduler.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_POLL_S = 0.004
_PATIENCE_S = 300
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Turn(NamedTuple):
    """What one turn took: seconds, and core seconds of all its processes."""

    wall_s: float
    core_s: float


class Contestant:
    """A command that appends lines to a file as it trains; starts at once and stands still."""

    def __init__(self, command: Sequence[str], lines: Path, log: Path) -> None:
        self._lines, self._log = lines, log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=log.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._signal(signal.SIGSTOP)

    def turn(self, num_lines: int) -> Turn:
        """Run until `num_lines` more lines are there. Raises RuntimeError when it ends or hangs."""
        wanted = self._count() + num_lines
        core_s, began = self._core_s(), time.perf_counter()
        self._signal(signal.SIGCONT)
        while self._count() < wanted:
            if self._process.poll() is not None or time.perf_counter() - began > _PATIENCE_S:
                raise RuntimeError(f"no line came: {self._log.read_text()[-2000:]}")
            time.sleep(_POLL_S)
        wall_s = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        return Turn(wall_s, self._core_s() - core_s)

    def peak_resident_mb(self) -> float:
        """Of the training process itself, its workers aside."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("this system does not report peak memory")

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _count(self) -> int:
        return self._lines.read_bytes().count(b"\n") if self._lines.exists() else 0

    def _core_s(self) -> float:
        """User and system time of every process of the group so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == self._process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS_A_SECOND

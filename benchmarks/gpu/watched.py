"""A process that is given up where it stays silent for too long, with all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TIME_UP = "the stage's time was up"
START_S = 60  # for imports, before the first line
_POLL_S = 0.05
_REAP_S = 2
_LAST_WORDS_S = 4
_KILL_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class Ended(NamedTuple):
    """Why it was killed, empty where it ended by itself; and its exit code."""

    verdict: str
    code: int | None

    @property
    def reason(self) -> str:
        if self.verdict:
            return self.verdict
        if self.code is not None and self.code < 0:
            return f"the process was ended by {signal.Signals(-self.code).name}"
        return f"the process ended with {self.code}"


def run_watched(
    command: Sequence[str],
    log: Path,
    *,
    heard: Callable[[], int],
    silent_s: float,
    until: float,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs it until it ends, is silent for too long, or the clock is at `until`.

    It is silent while `heard`, a number of lines, stays the same: `silent_s` at most, and START_S
    before its first line.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=environment
        )
    first = last = heard()
    verdict, since = "", time.monotonic()
    while process.poll() is None and not verdict:
        now, number = time.monotonic(), heard()
        if number != last:
            last, since = number, now
        allowed_s = max(silent_s, START_S) if number == first else silent_s
        if now - since > allowed_s:
            verdict = f"no result within {allowed_s:g} s"
        elif now > until:
            verdict = TIME_UP
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that is held in the driver is left behind.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)
    return Ended(verdict, process.returncode)


def end_with_parent() -> None:
    """Called in such a process: it is killed where the one that watches it is."""
    ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def deadline() -> float:
    """A little before the stage is ended from outside, to say what was not reached."""
    return time.monotonic() + float(os.environ["STAGE_SECONDS"]) - _LAST_WORDS_S

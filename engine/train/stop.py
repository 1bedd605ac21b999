"""A wish to stop, told by a signal: save, leave, and be started again.

SIGTERM (Slurm's end of time, a preemption), SIGUSR1 (Slurm's warning before it) and the first
Ctrl-C only set a flag, from the start of the command on; the training loop acts on it after its
step, and an evaluation in training is left at its next batch. A second Ctrl-C interrupts at once.
Once one has come, SIGTERM and SIGUSR1 change nothing until the process is gone: a launcher sends
them to those that still leave as soon as the first has left.
While a process waits for others to start, a signal ends it (engine/parallel/meeting.py).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopAsked(Exception):
    """Work that can be given up was left, since the process was asked to stop."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals inside; give them back to who had them after, or if one has come,
        ignore them: the process leaves, and its exit code says that it was asked to."""
        before = {kind: signal.signal(kind, self._ask) for kind in _KINDS}
        try:
            yield self
        finally:
            for kind, handler in before.items():
                leaves = self.asked and kind != signal.SIGINT
                if signal.getsignal(kind) is not signal.SIG_IGN:  # as by now, while it leaves
                    signal.signal(kind, signal.SIG_IGN if leaves else handler)

    def check(self) -> None:
        """Raise StopAsked once a signal has come."""
        if self.asked:
            raise StopAsked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""Tries something again while its failure may pass, with growing pauses, up to a deadline.

Pauses double from `first_pause_s` to `longest_pause_s` and are drawn from the upper half of that,
so that many processes do not knock at the same moment. A server that says how long to wait is
believed up to the longest pause.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, how soon and for how long; `deadline_s` is from the first try on."""

    max_tries: int = 5
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    deadline_s: float = 300.0

    def pause_s(self, tries: int, asked_s: float | None = None) -> float:
        """The pause after so many tries."""
        pause = min(self.first_pause_s * 2.0 ** (tries - 1), self.longest_pause_s)
        return max(pause * random.uniform(0.5, 1), min(asked_s or 0.0, self.longest_pause_s))


def with_retries(
    attempt: Callable[[float], Result],
    passing: Callable[[Exception], float | bool],
    policy: RetryPolicy,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """The result of `attempt`, which is given the seconds that are left.

    `passing` says of an exception whether trying again may help; a number is a pause asked for. The
    last exception is raised when it may not, or when tries or time are used up.
    """
    end = clock() + policy.deadline_s
    tries = 0
    while True:
        tries += 1
        try:
            return attempt(max(end - clock(), 0.001))
        except Exception as error:
            again = passing(error)
            if again is False or tries >= policy.max_tries:
                raise
            pause = policy.pause_s(tries, None if again is True else again)
            if clock() + pause >= end:
                raise
        sleep(pause)

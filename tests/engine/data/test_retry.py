from collections.abc import Callable

import pytest

from carillon.engine.data.retry import RetryPolicy, with_retries


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


def failing(times: int, error: Exception) -> Callable[[float], float]:
    left = [times]

    def attempt(left_s: float) -> float:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return left_s

    return attempt


def run(times: int, policy: RetryPolicy, clock: Clock, passing: float | bool = True) -> float:
    return with_retries(
        failing(times, OSError("no")),
        lambda error: passing,
        policy,
        sleep=clock.sleep,
        clock=lambda: clock.now,
    )


def test_pauses_double_up_to_the_longest() -> None:
    clock = Clock()
    policy = RetryPolicy(max_tries=6, first_pause_s=1, longest_pause_s=4, deadline_s=100)
    left_s = run(5, policy, clock)
    assert left_s == 100 - clock.now
    for pause, whole in zip(clock.pauses, (1, 2, 4, 4, 4), strict=True):
        assert whole / 2 <= pause <= whole


def test_tries_and_time_end() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="no"):
        run(9, RetryPolicy(max_tries=3, first_pause_s=1), clock)
    assert len(clock.pauses) == 2
    clock = Clock()
    with pytest.raises(OSError, match="no"):
        run(99, RetryPolicy(max_tries=99, first_pause_s=4, deadline_s=10), clock)
    assert clock.now < 10


def test_what_does_not_pass_is_raised_at_once_and_an_asked_pause_is_kept() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="no"):
        run(1, RetryPolicy(), clock, passing=False)
    assert clock.pauses == []
    run(1, RetryPolicy(first_pause_s=0.1), clock, passing=7.0)
    assert clock.pauses == [7.0]
    run(1, RetryPolicy(first_pause_s=0.1, longest_pause_s=20), clock, passing=1e9)
    assert clock.pauses[1] == 20

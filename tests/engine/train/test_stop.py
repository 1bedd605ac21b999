"""A signal asks to stop, and none ends a process that leaves for it."""

import os
import signal

import pytest

from carillon.engine.train.stop import StopAsked, StopRequest

KINDS = (signal.SIGTERM, signal.SIGUSR1)


def send(*kinds: signal.Signals) -> None:
    for kind in kinds:
        os.kill(os.getpid(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_signals_change_nothing_once_one_has_come(kind: signal.Signals) -> None:
    with StopRequest().listening() as stop:
        stop.check()
        send(kind)
        with pytest.raises(StopAsked):
            stop.check()
        send(*KINDS)
    send(*KINDS)  # by default each would end this process


def test_signals_are_given_back_where_none_has_come() -> None:
    heard: list[int] = []
    for kind in KINDS:
        signal.signal(kind, lambda number, frame: heard.append(number))
    with StopRequest().listening():
        pass
    send(*KINDS)
    assert heard == [*KINDS]

"""An operator whose sides end in every bad way, for test_gpu_suite.py: cases/ are alike."""

import os
import signal
import time
from typing import Any

import torch
from case import Bar, Call, Case, Outputs, Side, Unavailable

OP = "faulty"


def cases(tiny: bool) -> list[Case]:
    bars = (
        *(Bar("ms", 1e6), Bar("ms", 0.0), Bar("ratio", 2.0, "absent"), Bar("ratio", 0.0)),
        Bar("MiB", 1.0),
    )
    return [
        Case(name="checked", group="check", values={}, limit=1e-6),
        Case(name="timed", group="bar", values={"size": 3}, bars=bars),
    ]


def draw(case: Case, device: str) -> torch.Tensor:
    return torch.ones(3, device=device)


def crash(given: Any) -> Call:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("it goes on after a signal")


def hang(given: Any) -> Call:
    time.sleep(1000)
    raise AssertionError("nobody ended it")


def fill(given: Any) -> Call:
    raise torch.OutOfMemoryError("tried to allocate 4 TiB")


def reach_outside(given: Any) -> Call:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def ask(given: Any) -> Call:
    raise Unavailable("absent is not installed")


def break_down(given: Any) -> Call:
    raise KeyError("no such setting")


def sides(case: Case, device: str) -> list[Side]:
    right = Side("right", "ours", lambda given: lambda: [given * 2])
    if case.group == "check":
        wrong = Side("wrong", "ours", lambda given: lambda: [given * 2.001])
        not_a_number = Side("not a number", "ours", lambda given: lambda: [given * torch.nan])
        return [wrong, right, not_a_number]
    makers = (crash, reach_outside, fill, break_down, hang)
    bad = [Side(make.__name__, "ours", make) for make in makers]
    peer = Side("slower", "peer", lambda given: lambda: [given.expand(1000, 3).sum(0)])
    return [*bad, Side("absent", "peer", ask), peer, right]


def expected(case: Case, given: torch.Tensor) -> Outputs:
    return [given * 2]

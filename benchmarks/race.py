"""Sides of one case in turns: time and extra memory of each, and the row that is kept of them.

Every side returns its results (and gradients), and they are compared with ours first: a peer that
computes something else is no peer. Then each has its extra memory measured, and then they take
turns; a ratio is the median over turns of theirs over ours. With one thread times are the core's,
which other work on the machine does not enter; with several they are the wall's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from memory import extra_mb
from torch import Tensor

from carillon.kernels.roofline import Cost, floor_s

OURS = "ours"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
Side = Callable[[], Sequence[Tensor]]

_BUDGET_S = 4.0  # of the turns of one case, where three of them take no longer


def race(
    benchmark: Any,
    sides: Mapping[str, Side],
    *,
    op: str,
    case: str,
    size: int,
    unit: str,
    work: Iterable[Cost],
    left_out: Mapping[str, str],
    tolerance: float,
    backward: bool = False,
    comparable: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Measures the sides, ours first, and adds what is kept to the benchmark's row.

    `work` is what each pass must do at least. `tolerance` bounds ||theirs - ours|| of each result
    over ||ours||, or over a thousandth of the norm of all where that is more; `comparable` brings a
    side's results to one layout.
    """
    torch.compiler.reset()  # one case's compiled functions are of no use to another
    _require_same(sides, comparable or {}, tolerance)
    memory: dict[str, float] = {}
    once_s: dict[str, float] = {}
    for name, side in sides.items():
        memory[name] = extra_mb(lambda n=name, s=side: once_s.update({n: _call_s(s)}))
    took = _take_turns(benchmark, sides, once_s)
    median_s = {name: statistics.median(times) for name, times in took.items()}
    work = list(work)
    benchmark.extra_info.update(
        row(op, case, size, unit, backward, left_out),
        rounds=len(took[OURS]),
        seconds={name: _rounded(value) for name, value in median_s.items()},
        ratio={
            name: round(statistics.median(map(_over, times, took[OURS])), 2)
            for name, times in took.items()
            if name != OURS
        },
        extra_mb={name: round(value, 1) for name, value in memory.items()},
        gigaflop_per_s=round(sum(cost.flops for cost in work) / median_s[OURS] / 1e9, 1),
        gigabytes_per_s=round(sum(cost.size_bytes for cost in work) / median_s[OURS] / 1e9, 2),
        floor_h100_s=_rounded(sum(floor_s(cost) for cost in work)),
    )


def row(
    op: str, case: str, size: int, unit: str, backward: bool, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """What every row says of itself."""
    return {
        "op": op,
        "case": case,
        "pass": PASSES[backward],
        "size": size,
        "unit": unit,
        "num_threads": torch.get_num_threads(),
        "clock": "core" if torch.get_num_threads() == 1 else "wall",
        "left_out": dict(left_out),
    }


def _require_same(
    sides: Mapping[str, Side],
    comparable: Mapping[str, Callable[[Tensor], Tensor]],
    tolerance: float,
) -> None:
    """Calls each side once; the first call also compiles what is compiled."""

    def results(name: str) -> list[Tensor]:
        change = comparable.get(name, Tensor.float)
        return [change(one).float() for one in sides[name]()]

    ours = results(OURS)
    total = math.hypot(*(one.norm().item() for one in ours))
    for name in sides:
        if name == OURS:
            continue
        for index, (their, our) in enumerate(zip(results(name), ours, strict=True)):
            error = (their - our).norm().item() / max(our.norm().item(), 1e-3 * total)
            assert error <= tolerance, f"result {index} of {name} is off by {error:.2e} of ours"


def _take_turns(
    benchmark: Any, sides: Mapping[str, Side], once_s: Mapping[str, float]
) -> dict[str, list[float]]:
    """Of a long case the first call, whose memory was measured, counts as a turn.

    In others each turn begins with a call that does not count, to touch again what another side
    gave back to the system: on a virtual machine that is slow.
    """
    in_all_s = sum(once_s.values())
    is_long = in_all_s > _BUDGET_S
    took = {name: [once_s[name]] if is_long else [] for name in sides}

    def turn(name: str) -> None:
        if not is_long:
            sides[name]()
        took[name].append(_call_s(sides[name]))

    def others() -> None:
        for name in sides:
            if name != OURS:
                turn(name)

    rounds = min(max(int(_BUDGET_S / 2 / in_all_s), 3), 15) - len(took[OURS])
    benchmark.pedantic(lambda: turn(OURS), setup=others, rounds=rounds)
    return took


def _call_s(side: Side) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    side()
    return clock() - began


def _over(theirs: float, ours: float) -> float:
    return theirs / ours


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

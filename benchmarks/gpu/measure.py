"""Measures or checks the cases of one operator, in a process of its own; sweep.py starts it.

Appends a line to the records as each side of a case begins, and one with its result, so that
sweep.py knows what a process was at that hangs or dies. An error that leaves the GPU's context
unusable ends the process with LOST_CONTEXT; sweep.py starts another one for what is left.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from records import LOST_CONTEXT, append
from watched import end_with_parent

_TAIL = 1500  # characters of a message that are kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("module", type=Path)
    parser.add_argument("--group", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--side-s", type=float, default=1.0, help="seconds of timed calls a side")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--done", default="[]", help="JSON list of [case, side] to leave out")
    arguments = parser.parse_args()
    end_with_parent()
    return _Operator(arguments).run()


class _Operator:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from case import load
        from machine import read_rates

        self.arguments = arguments
        self.device: str = arguments.device
        self.module = load(arguments.module)
        self.rates = read_rates(arguments.rates, self.device)
        self.peak = 1.0
        self.done = {tuple(item) for item in json.loads(arguments.done)}

    def record(self, event: str, **values: Any) -> None:
        about = {"group": self.arguments.group, "module": self.arguments.module.stem}
        append(self.arguments.records, event, **about, **values)

    def run(self) -> int:
        cases = self.module.cases(self.arguments.tiny)
        planned = [
            (case, self.module.sides(case, self.device))
            for case in cases
            if case.group == self.arguments.group
        ]
        if any(case.items for case, _ in planned):
            import torch

            from carillon.engine.train.profile import peak_flops

            self.peak = peak_flops(torch.device(self.device), torch.bfloat16)
        plan = [[case.name, side.name, side.kind] for case, sides in planned for side in sides]
        self.record("plan", items=plan)
        # What takes long, or matters less, comes last: it costs none of the others their turn.
        for slow in (False, True):
            for case, sides in planned:
                left = [side for side in sides if (case.name, side.name) not in self.done]
                if not self.run_case(case, [side for side in left if side.is_slow == slow]):
                    return LOST_CONTEXT
        return 0

    def run_case(self, case: Any, sides: list[Any]) -> bool:
        """Measures the sides of one case; returns whether the GPU can be used further."""
        given = None
        for side in sides:
            names = {"case": case.name, "side": side.name, "kind": side.kind}
            self.record("begin", **names)
            plain = {
                key: value for key, value in case.values.items() if not isinstance(value, tuple)
            }
            result: dict[str, Any] = {"op": self.module.OP, "values": plain}
            lost = False
            try:
                if given is None:
                    given = self.module.draw(case, self.device)
                result |= {"status": "ok"} | self.result(case, side, given)
            except Exception as error:
                outcome, lost = said_of(error)
                result |= outcome
            bars = [bar._asdict() for bar in case.bars]
            self.record("result", **names, bars=bars, **result)
            if lost:
                return False
            self.let_go()
        return True

    def result(self, case: Any, side: Any, given: Any) -> dict[str, Any]:
        call = side.prepare(given)
        if case.group == "check":
            return self.check(case, call, given)
        return self.time(case, side, call)

    def check(self, case: Any, call: Any, given: Any) -> dict[str, Any]:
        from case import relative_error

        expected = self.module.expected(case, given)
        got = call()
        assert len(got) == len(expected)
        errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
        passed = all(error <= case.limit for error in errors)
        return {
            "status": "ok" if passed else "wrong",
            "errors": [f"{error:.3g}" for error in errors],
            "limit": case.limit,
        }

    def time(self, case: Any, side: Any, call: Any) -> dict[str, Any]:
        from timing import memory_of, time_call

        outputs = call()
        finite = all(bool(x.isfinite().all()) for x in outputs if x.dtype.itemsize > 1)
        del outputs
        memory = memory_of(call, self.device)
        timing = time_call(
            call, self.device, most_s=self.arguments.side_s, most_rounds=case.most_rounds
        )
        size_bytes = side.size_bytes or sum(cost.size_bytes for cost in case.costs)
        found: dict[str, Any] = {
            name: round(value, 5) for name, value in timing._asdict().items()
        } | {
            "gigabytes_per_s": round(size_bytes / timing.median_ms / 1e6, 1),
            "teraflop_per_s": round(sum(c.flops for c in case.costs) / timing.median_ms / 1e9, 2),
        }
        if case.items is not None:
            found |= self.rates_of(case, timing.median_ms)
        if memory is not None:
            found |= {name: round(value, 1) for name, value in memory._asdict().items()}
        if self.rates is not None:
            floor_ms = 1e3 * sum(self.rates.floor_s(cost) for cost in case.costs)
            found |= {"floor_ms": round(floor_ms, 6), "over_floor": None, "floor_of": self.rates.of}
            if floor_ms > 0:
                found["over_floor"] = round(timing.median_ms / floor_ms, 2)
        return found if finite else found | {"status": "wrong", "reason": "not finite"}

    def rates_of(self, case: Any, median_ms: float) -> dict[str, float]:
        """Items a second, and the share of the device's dense bf16 peak, as in a training log."""
        name, number = case.items
        flops_per_s = 1e3 * sum(cost.flops for cost in case.costs) / median_ms
        rate = round(1e3 * number / median_ms, 1)
        return {f"{name}_per_s": rate, "mfu": round(flops_per_s / self.peak, 4)}

    def let_go(self) -> None:
        """Memory, and what torch.compile keeps of earlier shapes."""
        import torch

        gc.collect()
        torch.compiler.reset()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def said_of(error: Exception) -> tuple[dict[str, str], bool]:
    """The status and reason of a side that failed, and whether the GPU's context is lost."""
    import torch
    from case import Unavailable

    from carillon.kernels.table import ProviderError

    text = f"{type(error).__name__}: {error}"[-_TAIL:]
    if isinstance(error, (Unavailable, ProviderError)):
        return {"status": "unavailable", "reason": str(error)[-_TAIL:]}, False
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory", "reason": text}, False
    where = "".join(traceback.format_exception(error))[-_TAIL:]
    said = {"status": "error", "reason": text, "traceback": where}
    # An illegal address, a failed assertion or a launch that timed out: every later call fails too.
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return said | {"status": "CUDA error"}, True
    return said, False


if __name__ == "__main__":
    sys.exit(main())

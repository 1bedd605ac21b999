"""Runs one side of one case under a profiler: run.sh --profile OP[:CASE[:SIDE]].

`--by torch` writes torch.profiler's table by kernel and a trace for chrome://tracing; `--by mark`
only marks one call for ncu or nsys, which started this process. CASE is the start of a case's name,
the first timed case without one; SIDE is our first provider that runs here without one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from case import Call, Case, Module, Unavailable, load

_CALLS = 3


def chosen(module: Module, case_name: str, tiny: bool) -> Case:
    timed = [case for case in module.cases(tiny) if case.group != "check"]
    for case in timed:
        if case.name.startswith(case_name):
            return case
    names = "\n  ".join(case.name for case in timed)
    raise SystemExit(f"no case of {module.OP} begins with '{case_name}'; there are\n  {names}")


def prepared(module: Module, case: Case, side_name: str, device: str) -> tuple[str, Call]:
    given = module.draw(case, device)
    sides = list(module.sides(case, device))
    ours = [side for side in sides if side.kind == "ours"]
    for side in [s for s in sides if s.name == side_name] if side_name else ours:
        try:
            return side.name, side.prepare(given)
        except Unavailable as error:
            print(f"{side.name} cannot run here: {error}")
    raise SystemExit(
        f"no side '{side_name or 'of ours'}' can run; there are {[s.name for s in sides]}"
    )


def profile_by_torch(call: Call, device: str, out: Path, title: str) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(_CALLS):
            call()
            synchronize(device)
    profiler.export_chrome_trace(str(out / "trace.json"))
    by = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    averages: Any = profiler.key_averages()
    table = averages.table(sort_by=by, row_limit=40, max_name_column_width=80)
    (out / "kernels.txt").write_text(f"{title}, {_CALLS} calls\n\n{table}\n")
    print(title, table, sep="\n")


def mark(call: Call, device: str) -> None:
    if not device.startswith("cuda"):
        raise SystemExit("ncu and nsys see a GPU's kernels: the device is the CPU")
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", help="OP[:CASE[:SIDE]]")
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--by", choices=["torch", "mark"], required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    op, case_name, side_name = [*given.what.split(":"), "", ""][:3]
    path = given.cases / f"{op}.py"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in given.cases.glob("*.py")))
        raise SystemExit(f"no operator '{op}'; there are {known}")
    module = load(path)
    case = chosen(module, case_name, given.tiny)
    side, call = prepared(module, case, side_name, given.device)
    for _ in range(2):  # compilation is no part of a profile
        call()
    synchronize(given.device)
    title = f"{op}, {case.name}, {side} on {given.device}"
    if given.by == "mark":
        mark(call, given.device)
        print(title)
    else:
        profile_by_torch(call, given.device, given.out, title)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the cases of a group, each operator in processes of its own, and records what ends badly.

A process that says nothing for too long is killed, one that dies is replaced, and the case that it
was at is recorded as timed out or crashed; nothing else is lost. Needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from records import LOST_CONTEXT, append, read
from watched import TIME_UP, Ended, deadline, run_watched

BAD = ("wrong", "error", "CUDA error", "crashed", "timed out", "not run")
MEASURE = Path(__file__).with_name("measure.py")
_TAIL = 1500
_MOST_IN_VAIN = 3
_NO_GPU = f"{_MOST_IN_VAIN} processes in a row lost the GPU at their first case"


class Supervisor:
    """Sees one operator's group through."""

    def __init__(self, module: Path, given: argparse.Namespace) -> None:
        self.module, self.given = module, given
        self.offset = given.records.stat().st_size if given.records.exists() else 0
        self.log: Path = given.logs / f"{given.group}-{module.stem}.log"
        self.done: list[list[str]] = []
        self.in_vain = 0

    def run(self, until: float) -> None:
        ended = False
        while not ended and time.monotonic() < until and self.in_vain < _MOST_IN_VAIN:
            ended = self.one_process(until)
        self.leave_out(TIME_UP if self.in_vain < _MOST_IN_VAIN else _NO_GPU)

    def one_process(self, until: float) -> bool:
        """Runs a process to its end; returns whether there is nothing left for another one."""
        ended = run_watched(
            [sys.executable, str(MEASURE), str(self.module), *self.passed_on()],
            self.log,
            heard=lambda: len(self.lines()),
            silent_s=self.given.case_s,
            until=until,
        )
        lines = self.lines()
        finished = [[x["case"], x["side"]] for x in lines if x["event"] == "result"]
        new = [x for x in lines if x["event"] == "begin"]
        new = [x for x in new if [x["case"], x["side"]] not in self.done]
        for begun in new:
            item = [begun["case"], begun["side"]]
            self.done.append(item)
            if item not in finished:
                self.record(begun, **self.outcome(ended))
        lost = ended.code == LOST_CONTEXT and len(new) == 1
        self.in_vain = self.in_vain + 1 if lost else 0
        if ended == Ended("", 0):
            return True
        if not new:  # it did not get to a case, and another one would not either
            self.record({}, **self.outcome(ended))
        return not new

    def passed_on(self) -> list[str]:
        given = self.given
        options: list[Any] = ["--group", given.group, "--device", given.device]
        options += ["--records", given.records, "--side-s", given.side_s]
        options += ["--done", json.dumps(self.done)]
        options += ["--rates", given.rates] if given.rates else []
        return [str(option) for option in options] + ["--tiny"] * given.tiny

    def outcome(self, ended: Ended) -> dict[str, str]:
        log = self.log.read_bytes()[-_TAIL:].decode(errors="replace")
        status = "timed out" if ended.verdict else "crashed"
        return {"status": status, "reason": ended.reason, "log": log}

    def leave_out(self, reason: str) -> None:
        """Records what was planned and not begun."""
        lines = self.lines()
        planned = [item for x in lines if x["event"] == "plan" for item in x["items"]]
        reached = [[x["case"], x["side"]] for x in lines if x["event"] == "result"]
        for case, side, kind in planned:
            if [case, side] not in reached:
                reached.append([case, side])
                begun = {"case": case, "side": side, "kind": kind}
                self.record(begun, status="not run", reason=reason)
        if not lines:
            self.record({}, status="not run", reason=reason)

    def lines(self) -> list[dict[str, Any]]:
        """The records of this operator's group since this began."""
        own = (self.given.group, self.module.stem)
        lines = read(self.given.records, self.offset)
        return [line for line in lines if (line.get("group"), line.get("module")) == own]

    def record(self, begun: dict[str, Any], **values: Any) -> None:
        about = {
            "group": self.given.group,
            "module": self.module.stem,
            "case": begun.get("case", ""),
            "side": begun.get("side", ""),
            "kind": begun.get("kind", ""),
        }
        append(self.given.records, "result", **about, **values)


def run_all(supervisors: list[Supervisor], until: float, at_once: bool) -> None:
    """One after the other with a fair share of the time each, or all at once."""
    if at_once:
        threads = [threading.Thread(target=one.run, args=(until,)) for one in supervisors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return
    for number, one in enumerate(supervisors):
        now = time.monotonic()
        share = 2 * (until - now) / (len(supervisors) - number)
        one.run(min(until, now + share))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("modules", type=Path, nargs="+", help="files of operators")
    parser.add_argument("--group", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--case-s", type=float, default=60.0, help="for one side of a case")
    parser.add_argument("--side-s", type=float, default=1.0, help="of timed calls, for a side")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--at-once", action="store_true", help="where nothing is timed")
    given = parser.parse_args()
    supervisors = [Supervisor(path, given) for path in given.modules]
    run_all(supervisors, deadline(), given.at_once)
    statuses = [x["status"] for s in supervisors for x in s.lines() if x["event"] == "result"]
    counts = [f"{statuses.count(status)} {status}" for status in sorted(set(statuses))]
    print(f"{given.group}: {', '.join(counts) or 'no cases'}")
    return 1 if set(BAD) & set(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())

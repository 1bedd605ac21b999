"""Runs the tests of the kernels, those of each operator in a process of its own, side by side.

A test that hangs, kills its process or loses the GPU's context is recorded, and the tests after it
run in another process. Needs nothing but Python itself, and pytest in the processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from records import append, read
from watched import deadline, run_watched

_TEST_S = 120  # Triton compiles within a test
_MOST = 20  # failures, and reasons of skips, that are kept of one operator
_ALL_RAN = (0, 1, 5)  # pytest's exit codes: passed, some failed, none selected
OUTCOMES = ("passed", "failed", "skipped")


class Folder:
    """The tests of one operator."""

    def __init__(self, path: Path, given: argparse.Namespace) -> None:
        self.path, self.given = path, given
        self.lines_file: Path = given.logs / f"tests-{path.stem}.jsonl"
        self.log: Path = given.logs / f"tests-{path.stem}.log"
        self.lost: list[dict[str, str]] = []

    def run(self, until: float) -> None:
        status = ""
        while not status:
            status = self.one_process(until)
        ends = [line for line in read(self.lines_file) if line["event"] == "end"]
        failed = [{"test": x["id"], "said": x["said"]} for x in ends if x["outcome"] == "failed"]
        failures = self.lost + failed
        counts = {name: sum(x["outcome"] == name for x in ends) for name in OUTCOMES}
        counts["failed"] += len(self.lost)
        skips = {x["said"] for x in ends if x["outcome"] == "skipped"}
        if status == "finished" and not counts["passed"] + counts["failed"]:
            status = "no test ran"
        append(
            self.given.records,
            "tests",
            folder=self.path.stem,
            status=f"{status}, not all passed" if failures else status,
            **counts,
            failures=failures[:_MOST],
            skips=sorted(skips)[:_MOST],
        )

    def one_process(self, until: float) -> str:
        """Empty where there are tests left for another one, else how it all ended."""
        number_before = len(self.begun())
        ended = run_watched(
            [sys.executable, "-m", "pytest", str(self.path), *self.options()],
            self.log,
            heard=lambda: len(read(self.lines_file)),
            silent_s=_TEST_S,
            until=until,
            environment=os.environ | {"CARILLON_TEST_LINES": str(self.lines_file)},
        )
        new = self.begun()[number_before:]
        done = {line["id"] for line in read(self.lines_file) if line["event"] == "end"}
        if time.monotonic() > until:  # what was running then has not failed
            return "not finished"
        self.lost += [{"test": test, "said": ended.reason} for test in new if test not in done]
        if not ended.verdict and ended.code in _ALL_RAN:
            return "finished"
        return "" if new else f"failed to start: {ended.reason}"

    def begun(self) -> list[str]:
        return [line["id"] for line in read(self.lines_file) if line["event"] == "begin"]

    def options(self) -> list[str]:
        options = ["-p", "report_plugin", "-p", "no:cacheprovider", "--tb=short"]
        options += ["--continue-on-collection-errors"]
        # Warnings of other releases are no failure of a kernel.
        options += ["-W", "default"]
        return options + (["-m", self.given.marker] if self.given.marker else [])


def folders(tests: Path) -> list[Path]:
    """The folders of operators in `tests`; `tests` itself where it has none."""
    inner = [path.parent for path in sorted(tests.glob("*/test_*.py"))]
    return list(dict.fromkeys(inner)) or [tests]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--marker", required=True, help="of the tests that run; empty for all")
    given = parser.parse_args()
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: no test ran")
        append(given.records, "tests", folder=given.tests.stem, status="pytest is not installed")
        return 1
    until = deadline()
    every = [Folder(path, given) for path in folders(given.tests.resolve())]
    threads = [threading.Thread(target=one.run, args=(until,)) for one in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines: list[dict[str, Any]] = [x for x in read(given.records) if x["event"] == "tests"]
    for line in lines:
        counts = ", ".join(f"{line[name]} {name}" for name in OUTCOMES)
        print(f"{line['folder']}: {line['status']}: {counts}")
    good = [line for line in lines if line["status"] == "finished"]
    return 0 if len(good) == len(every) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs `carillon` commands as processes that are to come together, forked from here so that torch
is imported once, all at the same time: python start_worker.py CASES.json RESULTS.json

A case is a list of processes, each with argv, environment, late_s (it starts so much later) and
terminate_at (a text of its stderr at which it gets SIGTERM, or none). The result of each is its
exit code, its stderr, and the seconds that it ran and that it outlived the SIGTERM.
"""

import json
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carillon.engine.cli import main

# It imports torch and all, before the forks.
forked = runpy.run_path(str(Path(__file__).with_name("ranks_worker.py")))["forked"]


@dataclass
class Child:
    given: dict[str, Any]
    stderr: Path
    pid: int = 0
    began: float = field(default_factory=time.monotonic)
    terminated: float | None = None
    result: dict[str, Any] | None = None

    def start(self) -> None:
        self.pid = forked(self.stderr, self._run)

    def _run(self) -> int:
        time.sleep(self.given["late_s"])
        os.environ.update(self.given["environment"])
        return main(self.given["argv"])

    def look(self) -> None:
        text = self.given["terminate_at"]
        if text is not None and self.terminated is None and text in self.stderr.read_text():
            os.kill(self.pid, signal.SIGTERM)
            self.terminated = time.monotonic()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            now = time.monotonic()
            self.result = {
                "code": os.waitstatus_to_exitcode(status),
                "stderr": self.stderr.read_text(),
                "seconds": now - self.began,
                "outlived_s": None if self.terminated is None else now - self.terminated,
            }


def run(cases: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Any]:
    children = {
        name: [Child(given, folder / f"{name}-{i}") for i, given in enumerate(case)]
        for name, case in cases.items()
    }
    running = [child for case in children.values() for child in case]
    for child in running:
        child.stderr.touch()
        child.start()
    while running:
        for child in running:
            child.look()
        running = [child for child in running if child.result is None]
        time.sleep(0.05)
    return {name: [child.result for child in case] for name, case in children.items()}


if __name__ == "__main__":
    given, results = Path(sys.argv[1]), Path(sys.argv[2])
    results.write_text(json.dumps(run(json.loads(given.read_text()), results.parent)))

"""Runs of three watched processes of which one is stopped, killed or leaves early, forked from here
so that torch is imported once, and all at a time: python watchdog_worker.py RESULTS.json

Each process hangs, as in a collective whose others don't come. A run's result: how each process
ended, what it wrote, and after how many seconds the last one was gone.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from carillon.engine.parallel.watchdog import Watchdog

RANKS = 3
SOME_BEATS_S = 3
CASES = {
    "stopped 2": (2, signal.SIGSTOP),
    "stopped 0": (0, signal.SIGSTOP),  # its watcher is the one that the others hear
    "killed 1": (1, signal.SIGKILL),
    "silent 1": (1, signal.SIGSTOP),  # with its watcher, as when a node is lost
    "leaves": (1, None),  # before the others end: no loss
    "stranger": (1, None),  # somebody else talks to the watcher of rank 0
}


class Run(NamedTuple):
    name: str
    pids: list[int]
    files: list[Path]


def start(name: str, folder: Path) -> Run:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    files = [folder / f"{name} {rank}" for rank in range(RANKS)]
    return Run(name, [fork_rank(rank, name, files[rank]) for rank in range(RANKS)], files)


def fork_rank(rank: int, case: str, stderr: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        place = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(place)
        with Watchdog(2) as watchdog:
            dist.init_process_group("gloo")
            watchdog.join()
            stderr.with_name(f"{stderr.name} joined").touch()
            if case == "stranger":
                talk_to(watchdog)
            elif case != "leaves":
                wait_in_a_collective()
            elif rank != 1:
                time.sleep(SOME_BEATS_S + 8)
        code = 0
    finally:
        os._exit(code)


def wait_in_a_collective() -> None:
    time.sleep(120)


def talk_to(watchdog: Watchdog) -> None:
    if watchdog._hub is not None:
        for said in (b"lost nothing\n", b"x" * 100_000, b"\xff\n", b" 1\nlost nothing\n"):
            with socket.create_connection(("127.0.0.1", watchdog._hub.getsockname()[1])) as line:
                line.sendall(said)
    time.sleep(SOME_BEATS_S + 8)


def finish(run: Run) -> dict[str, object]:
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in run.pids]
    return {"codes": codes, "seconds": time.monotonic() - began}


def watchers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main(results: Path) -> None:
    runs = [start(name, results.parent) for name in CASES]
    while not all(Path(f"{file} joined").exists() for run in runs for file in run.files):
        time.sleep(0.1)
    time.sleep(SOME_BEATS_S)
    frozen: list[int] = []
    for run in runs:
        victim, number = CASES[run.name]
        if run.name.startswith("silent"):
            frozen = [run.pids[victim], *watchers_of(run.pids.pop(victim))]
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
        elif number is not None:
            os.kill(run.pids[victim], number)
    done = {run.name: finish(run) for run in runs}
    for pid in frozen:
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)  # a watcher may outlive its process by a poll
    for run in runs:
        done[run.name]["stderr"] = [file.read_text() for file in run.files]
    results.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs of three watched processes of which one is stopped, killed or leaves early, forked from here
so that torch is imported once, and all at a time: python watchdog_worker.py RESULTS.json

Each process goes from one collective to the next, so the others hang in one, or fail. A run's
result: how each process ended, what it wrote, and after how many seconds the last one was gone.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from carillon.engine.parallel.watchdog import Watchdog

RANKS = 3
WATCHDOG_S = 5  # on a busy machine a watcher may not come to its turn for a while
MANY = 1100
SOME_BEATS_S = 3
CASES = {
    "stopped 2": (2, signal.SIGSTOP),
    "stopped 0": (0, signal.SIGSTOP),  # its watcher is the one that the others hear
    "killed 1": (1, signal.SIGKILL),
    "killed 0": (0, signal.SIGKILL),
    "killed both 1": (1, signal.SIGKILL),  # it and its watcher
    "silent 1": (1, signal.SIGSTOP),  # with its watcher, as when a node is lost
    "watcher 1": (1, signal.SIGKILL),  # only its watcher: no loss
    "watcher 0": (0, signal.SIGKILL),
    "watcher, killed 1": (1, signal.SIGKILL),  # its watcher, and a while later it
    "fails": (1, None),  # all of them, of themselves: no loss
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
        with Watchdog(WATCHDOG_S) as watchdog:
            dist.init_process_group("gloo")
            watchdog.join()
            stderr.with_name(f"{stderr.name} joined").touch()
            if case == "stranger":
                talk_to(watchdog)
            elif case == "fails":
                raise RuntimeError("of itself")
            elif case in ("watcher 1", "watcher 0"):
                work_in_collectives(SOME_BEATS_S + 8)
            elif case != "leaves":
                work_in_collectives(120)
            elif rank != 1:
                time.sleep(SOME_BEATS_S + 8)
        code = 0
    except RuntimeError as error:
        os.write(2, f"went on: {error}".encode())
    finally:
        os._exit(code)


def work_in_collectives(seconds: float) -> None:
    """All of them leave by the same step."""
    began, done = time.monotonic(), torch.zeros(1)
    while not done:
        done[0] = time.monotonic() - began > seconds
        dist.all_reduce(done)
        time.sleep(0.1)


def talk_to(watchdog: Watchdog) -> None:
    if watchdog._is_hub:
        for said in (b"lost nothing\n", b"x" * 100_000, b"\xff\n", b" 1\nlost nothing\n"):
            with socket.create_connection(("127.0.0.1", watchdog._door.getsockname()[1])) as line:
                line.sendall(said)
    time.sleep(SOME_BEATS_S + 8)


def finish(run: Run) -> dict[str, object]:
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in run.pids]
    return {"codes": codes, "seconds": time.monotonic() - began}


def watchers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def many() -> int:
    """How many watchers hear rank 0's, of more than select() takes and a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.environ.update({"RANK": "0", "WORLD_SIZE": str(MANY)})
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with ExitStack() as connections, Watchdog(8) as watchdog:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        place = ("127.0.0.1", watchdog._door.getsockname()[1])
        lines = [connections.enter_context(socket.create_connection(place)) for _ in range(MANY)]
        for rank, line in enumerate(lines):
            line.sendall(f"{watchdog._token} {rank} 1\n".encode())
            line.settimeout(20)
        heard = sum(line.recv(5) == b"beat\n" for line in lines)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return heard


def main(results: Path) -> None:
    runs = [start(name, results.parent) for name in CASES]
    while not all(Path(f"{file} joined").exists() for run in runs for file in run.files):
        time.sleep(0.1)
    time.sleep(SOME_BEATS_S)
    frozen: list[int] = []
    for run in runs:
        victim, number = CASES[run.name]
        if run.name.startswith("watcher"):
            os.kill(*watchers_of(run.pids[victim]), signal.SIGKILL)
        elif run.name.startswith("killed both"):
            for pid in (*watchers_of(run.pids[victim]), run.pids[victim]):
                os.kill(pid, signal.SIGKILL)
        elif run.name.startswith("silent"):
            frozen = [run.pids[victim], *watchers_of(run.pids.pop(victim))]
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
        elif number is not None:
            os.kill(run.pids[victim], number)
    time.sleep(SOME_BEATS_S)
    late = next(run for run in runs if run.name == "watcher, killed 1")
    os.kill(late.pids[1], signal.SIGKILL)
    done = {run.name: finish(run) for run in runs}
    for pid in frozen:
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)  # a watcher may outlive its process by a poll
    for run in runs:
        done[run.name]["stderr"] = [file.read_text() for file in run.files]
    results.write_text(json.dumps(done | {"many": many()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

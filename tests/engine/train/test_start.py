"""Processes that cannot come together: a message that says why, exit code 2, and no waiting."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Setup = Any  # conftest's
SECONDS = 10  # that a process waits for the others


class Start(NamedTuple):
    """A process of a run: its place, and settings that only it is given."""

    rank: int
    size: int
    overrides: tuple[str, ...] = ()
    address: str = "127.0.0.1"


CASES = {
    "missing": [Start(0, 2)],
    "alone": [Start(1, 2)],
    "taken": [Start(0, 2)],
    "unset": [Start(0, 2, (), "")],
    "differ": [
        Start(0, 3),
        Start(1, 3, ("optimization.lr=0.5", "experiment.seed=4")),
        Start(2, 3, ("distributed.tp=1", "distributed.cp=1", "optimization.lr=0.5")),
    ],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(place: Start, setup: Setup, port: int) -> subprocess.Popen[str]:
    given = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    environment = {k: v for k, v in (os.environ | given).items() if v}
    argv = [*setup.argv("data.batch_size=24"), f"distributed.timeout_s={SECONDS}"]
    return subprocess.Popen(
        [sys.executable, "-m", "carillon.engine.cli", *argv, *place.overrides],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    error = process.communicate(timeout=180)[1]
    return process.returncode, error


@pytest.fixture(scope="module")
def ended(make_setup: Any) -> dict[str, list[tuple[int, str]]]:
    """Exit code and stderr of every process, all cases started at once."""
    setup: Setup = make_setup()
    running = {}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, places in CASES.items():
            port = int(taken.getsockname()[1]) if name == "taken" else free_port()
            running[name] = [start(place, setup, port) for place in places]
        results = {name: [end(process) for process in case] for name, case in running.items()}
    assert not Path(setup.output).exists()
    return results


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", f"not all 2 processes came within {SECONDS} s: look why one did not start"),
        ("alone", "the processes did not come together: look that rank 0 runs"),
        ("taken", "is in use on this machine: end what listens there, or take another"),
        ("unset", "start it by torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR"),
    ],
)
def test_what_keeps_processes_apart_is_told(ended: Any, name: str, message: str) -> None:
    ((code, error),) = ended[name]
    assert code == 2, error
    assert error.count(message) == 1, error
    assert "Traceback" not in error


def test_ranks_that_were_given_other_settings(ended: Any) -> None:
    assert [code for code, _ in ended["differ"]] == [2, 2, 2], ended["differ"]
    first, *others = (error for _, error in ended["differ"])
    assert "optimization.lr is 0.001 on rank 0 and 0.5 on rank 1" in first, first
    assert "optimization.lr is 0.001 on rank 0 and 0.5 on rank 2" in first
    assert "and 4 on rank 1" in first
    assert "by the same command, from the same config file" in first
    assert all("carillon: " not in error and "Traceback" not in error for error in others)

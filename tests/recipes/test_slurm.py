"""recipes/slurm/train.sbatch, by stand-ins of sbatch, srun and scontrol on this machine."""

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.train.run_config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
RECIPE = ROOT / "recipes" / "emoji_quickstart.yaml"
FAKES = Path(__file__).with_name("fake_slurm")
SCRIPTS = [
    SCRIPT,
    FAKES / "scontrol",
    *sorted(ROOT.glob("benchmarks/**/*.sh")),
    ROOT / ".ci" / "run",
]
TINY_SET = runpy.run_path(str(Path(__file__).with_name("tiny_set.py")))


class Cluster:
    """Two nodes with two processes each, and the folder of a job."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.state, self.job = folder, folder / "state", _job_with_a_free_port()
        self.state.mkdir(parents=True)
        self.given = (*TINY_SET["SMALL"], f"data.path={data}", "evaluation.in_training.every=0")

    def submit(self, *arguments: str) -> "subprocess.Popen[str]":
        path = f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["sbatch", "--nodes=2", "--ntasks-per-node=2", str(SCRIPT), *arguments]
        fake = {"FAKE_SLURM": str(self.state), "FAKE_SLURM_JOB": str(self.job)}
        environment = os.environ | {"PATH": path} | fake
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True)

    def train(self, *overrides: str) -> "subprocess.Popen[str]":
        return self.submit(str(RECIPE), *self.given, *overrides)

    def tasks(self, runs: str = "bash") -> list[int]:
        """The processes that srun has started, once they are those of `carillon env` or of the
        training; the latter start `carillon train` as their first child."""
        self.wait_for(lambda: self._step().get("runs") == runs)
        return list(self._step()["pids"])

    def _step(self) -> dict[str, Any]:
        file = self.state / "step"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def warn(self, runs: str = "bash") -> None:
        for pid in self.tasks(runs):
            os.kill(pid, signal.SIGUSR1)

    def wait_for(self, done: Callable[[], object]) -> None:
        began = time.monotonic()
        while not done():
            assert time.monotonic() - began < 120, self.log()
            time.sleep(0.05)

    def wait_for_steps(self, num: int) -> None:
        self.wait_for(lambda: len(self.steps()) >= num)

    def steps(self) -> list[int]:
        files = list(self.folder.glob("runs/*/metrics.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        return [step for step in map(_step, lines) if step is not None]

    def log(self) -> str:
        return (self.folder / f"carillon-{self.job}.log").read_text()

    def codes(self) -> list[int]:
        file = self.state / "codes"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


def _job_with_a_free_port() -> int:
    """A number of which train.sbatch makes a port that nobody has: others may test here too."""
    while True:
        job = random.randrange(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", 20_000 + job))
            return job


def _step(line: str) -> int | None:
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError:  # it is being written
        return None
    return int(values["step"]) if "loss" in values else None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(RECIPE, ["data.path=any"])
    written: Path = TINY_SET["write_set"](tmp_path_factory.mktemp("set") / "tiny", config)
    return written


@pytest.fixture
def cluster(tmp_path: Path, data: Path) -> Cluster:
    return Cluster(tmp_path / "job", data)


def test_a_job_that_is_warned_goes_back_into_the_queue_until_it_finishes(cluster: Cluster) -> None:
    """Whenever the warning comes, and whoever of the four leaves first. --fresh holds for the
    job's first start only."""
    rare = "logging.checkpoint_interval_steps=1000"
    job = cluster.train("optimization.steps=200", rare, "--fresh")
    cluster.warn("carillon")  # `carillon env` runs
    cluster.wait_for(lambda: cluster.codes() == [75])
    cluster.warn()  # Python starts
    cluster.wait_for(lambda: cluster.codes() == [75, 75])
    cluster.wait_for_steps(4)
    cluster.warn()
    assert job.wait(180) == 0, cluster.log()
    assert cluster.codes() == [75, 75, 75, 0]
    assert cluster.steps() == list(range(1, 201))
    log = cluster.log()
    for start in range(1, 5):
        assert f"start {start}: 4 processes on 2 nodes, node[1-2]" in log
    assert log.count("environment of ") >= 6  # one a node and start, but perhaps for the first
    assert "Traceback" not in log
    assert set((cluster.state / "cpus").read_text().split()) == {"12"}
    assert not list(cluster.folder.glob(".carillon-*"))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_process_ends_the_job(cluster: Cluster, number: signal.Signals) -> None:
    """With the stacks of all that are there; and what is wrong does not go back into the queue."""
    rare = "logging.checkpoint_interval_steps=1000000"
    job = cluster.train("optimization.steps=100000", rare, "distributed.watchdog_s=3")
    cluster.wait_for_steps(3)
    began = time.monotonic()
    wrapper = cluster.tasks()[1]
    run = Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split()[0]
    os.kill(int(run), number)
    assert job.wait(120) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    assert cluster.codes() == [128 + signal.SIGKILL]
    log = cluster.log()
    for rank in (0, 1, 2, 3):
        if (rank, number) == (1, signal.SIGKILL):
            continue
        _, found, stacks = log.partition(f"carillon: [rank {rank}] rank 1 (process ")
        assert found, log
        assert "in fit" in stacks.split("carillon: ")[0], log
    assert "back into the queue" not in log


def test_a_config_that_cannot_be_used_ends_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shell that submits it has a count of its own, which is none of Slurm's."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    assert cluster.train("optimization.stepz=3").wait(120) == 2
    assert cluster.codes() == [2]
    assert cluster.log().count("optimization.stepz") == 1
    assert "start 1: 4 processes" in cluster.log()


def test_no_config_is_told_before_anything_starts(cluster: Cluster) -> None:
    assert cluster.submit().wait(60) == 2
    assert cluster.log().startswith("usage: sbatch")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_are_clean(script: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

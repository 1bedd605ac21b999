"""Processes that cannot come together: one message that says why, exit code 2, and no waiting."""

import json
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import TCPStore

from carillon.engine.cli import main
from carillon.engine.config import UserError
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.start import start_world

Setup = Any  # conftest's
WORKER = Path(__file__).with_name("start_worker.py")
SECONDS = 10  # that a process waits for the others
BAD = "data.batchsize=24"


class Start(NamedTuple):
    """A process of a run: its place, and settings that only it is given."""

    rank: int
    size: int
    overrides: tuple[str, ...] = ()
    late_s: float = 0
    terminate_at: str | None = None


SET = "evaluation.retrieval.foo.path=there"
CASES = {
    "missing": [Start(0, 3), Start(1, 3)],
    "alone": [Start(1, 2)],
    "taken": [Start(0, 2), Start(1, 2)],
    "foreign": [Start(0, 4), Start(1, 4), Start(3, 4)],
    "differ": [
        Start(0, 3),
        Start(1, 3, ("optimization.lr=0.5", "experiment.seed=4")),
        Start(2, 3, ("distributed.tp=1", "distributed.cp=1", "optimization.lr=0.5")),
    ],
    "only another has it": [Start(0, 2), Start(1, 2, (SET,))],
    "sizes": [Start(0, 3), Start(1, 2)],
    "same error": [Start(0, 3, (BAD,), 2), Start(1, 3, (BAD,)), Start(2, 3, (BAD,))],
    "layout": [Start(0, 2, ("data.batch_size=15",), 2), Start(1, 2, ("data.batch_size=15",))],
    "another's error": [Start(0, 3), Start(1, 3, (BAD,)), Start(2, 3, (BAD,))],
    "error alone": [Start(1, 2, (BAD,))],
    "terminated": [Start(0, 2, terminate_at="waiting")],
    "terminated before rank 0": [Start(1, 2, terminate_at="waiting")],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def described(place: Start, setup: Setup, port: int) -> dict[str, Any]:
    given = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    argv = [*setup.argv("data.batch_size=24"), f"distributed.rendezvous_s={SECONDS}"]
    return {
        "argv": [*argv, *place.overrides],
        "environment": given,
        "late_s": place.late_s,
        "terminate_at": place.terminate_at,
    }


@pytest.fixture(scope="module")
def ended(make_setup: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every process, all cases started at once."""
    setup: Setup = make_setup()
    folder = tmp_path_factory.mktemp("start")
    with socket.socket() as silent:
        silent.bind(("", 0))
        silent.listen()
        others = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
        others.set("carillon/0/0/rank/0", json.dumps({"token": "a"}))
        others.set("carillon/0/0/rank/1", json.dumps({"token": "b"}))
        others.set("carillon/0/0/verdict", json.dumps({"tokens": ["a", "b"]}))
        ports = {"taken": silent.getsockname()[1], "foreign": others.port}
        cases = {}
        for name, places in CASES.items():
            port = ports.get(name) or free_port()
            cases[name] = [described(place, setup, port) for place in places]
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, str(WORKER), "cases.json", "results.json"]
        subprocess.run(command, cwd=folder, check=True, timeout=240)
    assert not Path(setup.output).exists()
    return dict(json.loads((folder / "results.json").read_text()))


def messages(results: list[dict[str, Any]]) -> list[str]:
    """The closing lines of all processes, in order of ranks."""
    error = "".join(result["stderr"] for result in results)
    assert "Traceback" not in error
    assert "frame #" not in error
    return [line for line in error.splitlines() if line.startswith("carillon: ")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing", ["not all 3 processes came within 10 s (distributed.rendezvous_s): look why"]),
        ("alone", ["[rank 1] the processes did not come together: look that rank 0 runs"]),
        (
            "taken",
            [
                "is in use on this machine: end what listens there, or take another",
                "[rank 1] what listens at 127.0.0.1",
            ],
        ),
        (
            "foreign",
            [
                "is in use on this machine: end what listens there, or take another",
                "[rank 1] another process has come as rank 1: another training uses the port",
                "[rank 3] the rank 0 that answers has not read this process: another training",
            ],
        ),
        ("differ", ["ranks were started with different settings: experiment.seed is 1337 on"]),
        (
            "only another has it",
            ['evaluation.retrieval.foo.path is not set on rank 0 and "there" on rank 1'],
        ),
        ("sizes", ["different settings: WORLD_SIZE is 3 on rank 0 and 2 on rank 1. Start all"]),
        ("another's error", ["ranks 1, 2: "]),
        ("error alone", ["[rank 1] "]),
        ("layout", ["data.batch_size: 15 do not divide over 2 data-parallel processes"]),
    ],
)
def test_what_keeps_processes_apart_is_told_once(
    ended: Any, name: str, expected: list[str]
) -> None:
    results = ended[name]
    assert [result["code"] for result in results] == [2] * len(results), results
    found = messages(results)
    assert len(found) == len(expected), found
    for line, message in zip(found, expected, strict=True):
        assert message in line


def test_differences_name_setting_rank_and_value(ended: Any) -> None:
    (first,) = messages(ended["differ"])
    assert "optimization.lr is 0.001 on rank 0 and 0.5 on rank 1" in first, first
    assert "optimization.lr is 0.001 on rank 0 and 0.5 on rank 2" in first
    assert "and 4 on rank 1" in first
    assert "by the same command, from the same config file" in first


@pytest.mark.parametrize("name", ["same error", "another's error", "error alone"])
def test_an_error_at_load_is_told_by_one_process(ended: Any, name: str) -> None:
    """Whoever has it, and whoever comes first; alone after a bound that is not the rendezvous'."""
    results = ended[name]
    assert [result["code"] for result in results] == [2] * len(results), results
    assert len(messages(results)) == 1
    assert "".join(result["stderr"] for result in results).count("data.batchsize: unknown key") == 1
    assert all(result["seconds"] < 60 for result in results)


def test_whom_a_process_waits_for_is_told_meanwhile(ended: Any) -> None:
    first, second = (result["stderr"] for result in ended["missing"])
    assert re.search(r"^rank 2 of 3 have not come; waiting \d s more", first, re.M), first
    assert second == ""
    (alone,) = (result["stderr"] for result in ended["alone"])
    assert re.search(r"^\[rank 1\] rank 0 does not answer; waiting \d s more", alone, re.M), alone


@pytest.mark.parametrize("name", ["terminated", "terminated before rank 0"])
def test_sigterm_ends_a_process_that_waits_for_others_at_once(ended: Any, name: str) -> None:
    (result,) = ended[name]
    assert result["code"] == 128 + 15, result
    assert result["outlived_s"] < 4
    assert messages([result]) == []


def test_torchrun_kills_no_process_before_one_has_told(setup: Setup, tmp_path: Path) -> None:
    """Rank 0 comes last, and torchrun ends all when the first has ended."""
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    process = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "carillon.engine.cli", *setup.argv("data.batch_size=15")),
        ],
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 1  # torchrun's
    assert process.stderr.count("carillon: data.batch_size: 15 do not divide") == 1, process.stderr
    assert process.stderr.count("do not divide") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "x"}, "RANK: 'x' given; a whole number, 0 or more, is allowed: start it by"),
        ({"RANK": "2"}, "RANK: 2 given, but WORLD_SIZE is 2; use 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' given; a whole number, 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' given; a whole number, 1 or more"),
        ({"RANK": "", "WORLD_SIZE": "0"}, "RANK: '' given"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1' given; a whole number, 0 or more"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000' given; a whole number, 1 to 65535"),
        ({"MASTER_ADDR": ""}, "RANK is set and MASTER_ADDR not: start it by torchrun, which sets"),
        ({"RANK": None}, "WORLD_SIZE=2 is set and RANK is not: start it by torchrun"),
        ({"RANK": None, "WORLD_SIZE": "0"}, "WORLD_SIZE: '0' given"),
    ],
)
def test_an_environment_that_makes_no_place(
    given: dict[str, str | None],
    message: str,
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | given).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(setup.argv())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("carillon: ") == 1
    assert message in error


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (place | {"LOCAL_RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK: 2 given, .* 2 GPU.*--nproc-per-node=2"):
        start_world(DistributedConfig(device="cuda"), {})

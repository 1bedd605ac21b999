"""A stopped or killed process ends the run everywhere, with every process's stacks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("watchdog_worker.py")
KILLED = -9


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("watchdog") / "results.json"
    command = [sys.executable, str(WORKER), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(results.read_text()))


@pytest.mark.parametrize("victim", [2, 0])
def test_a_stopped_process_ends_all_with_every_stack(cases: dict[str, Any], victim: int) -> None:
    case = cases[f"stopped {victim}"]
    assert case["codes"] == [KILLED] * 3
    assert case["seconds"] < 60
    for rank, text in enumerate(case["stderr"]):
        assert text.startswith(f"carillon: [rank {rank}] "), text
        assert "in work_in_collectives" in text, text
    assert f"rank {victim} (process" in case["stderr"][victim]
    assert "has been stopped for" in case["stderr"][victim]


def test_the_others_hear_which_process_was_stopped(cases: dict[str, Any]) -> None:
    first, second, third = cases["stopped 2"]["stderr"]
    assert "rank 2 (process" in first
    assert "rank 2 (process" in second
    assert "rank 2 (process" in third
    assert all("rank 0 (process" in text for text in cases["stopped 0"]["stderr"])


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_all(cases: dict[str, Any], victim: int) -> None:
    """The collective of the others fails at once; that is among their stacks, no traceback else."""
    case = cases[f"killed {victim}"]
    assert case["codes"] == [KILLED] * 3
    assert case["seconds"] < 60
    for rank, text in enumerate(case["stderr"]):
        assert f"rank {victim} (process" in text, text
        assert "ended without a word: killed, or out of memory" in text, text
        assert ("in work_in_collectives" in text) == (rank != victim), text
        assert ("dist.all_reduce(done)" in text) == (rank != victim), text
        assert "went on" not in text


@pytest.mark.parametrize("name", ["killed both 1", "watcher, killed 1"])
def test_a_killed_process_without_a_watcher_ends_all(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert case["codes"] == [KILLED] * 3
    first, second, third = case["stderr"]
    assert second == ""
    for text in (first, third):
        assert "rank 1 and its watcher ended without a word" in text
        assert "in work_in_collectives" in text


@pytest.mark.parametrize("victim", [1, 0])
def test_a_watcher_that_dies_is_told_and_no_loss(cases: dict[str, Any], victim: int) -> None:
    case = cases[f"watcher {victim}"]
    assert case["codes"] == [0, 0, 0], case["stderr"]
    told = f"carillon: the watcher of rank {victim} has died. Its process lives and the run goes on"
    assert [told in text for text in case["stderr"]] == [victim == 1, victim == 0, False]
    assert all(text.count("\n") <= 1 for text in case["stderr"])


def test_an_error_of_its_own_goes_on(cases: dict[str, Any]) -> None:
    assert cases["fails"]["codes"] == [1, 1, 1]
    assert cases["fails"]["stderr"] == ["went on: of itself"] * 3


def test_a_lost_node_is_silent(cases: dict[str, Any]) -> None:
    case = cases["silent 1"]
    assert case["codes"] == [KILLED] * 2
    first, second, third = case["stderr"]
    assert second == ""
    assert "rank 1 has been silent for" in first
    assert "rank 1 has been silent for" in third


def test_who_leaves_early_is_not_lost(cases: dict[str, Any]) -> None:
    assert cases["leaves"]["codes"] == [0, 0, 0]
    assert cases["leaves"]["stderr"] == ["", "", ""]


def test_strangers_are_not_heard(cases: dict[str, Any]) -> None:
    assert cases["stranger"]["codes"] == [0, 0, 0]
    assert cases["stranger"]["stderr"] == ["", "", ""]


def test_the_hub_hears_more_than_a_thousand(cases: dict[str, Any]) -> None:
    """It takes the files that it needs: the limit stands at 256 as it starts."""
    assert cases["many"] == 1100

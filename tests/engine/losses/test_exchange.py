"""Contrastive ops and losses over 1 to 4 ranks, texts gathered or around a ring: the results and
gradients of the whole batch in one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.parallel.parity import TOLERANCE_FP32

WORKER = Path(__file__).with_name("exchange_worker.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("exchange") / "report.json"
    command = [sys.executable, str(WORKER), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_whole_batch(report: dict[str, Any], num_ranks: int) -> None:
    errors = report[str(num_ranks)]["errors"]
    assert len(errors) == 22
    worse = {case: of for case, of in errors.items() if max(of.values()) > TOLERANCE_FP32}
    assert not worse, worse


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_rank_of_a_ring_holds_all_columns(report: dict[str, Any], num_ranks: int) -> None:
    """8 pairs of 64 dims a rank."""
    assert report[str(num_ranks)]["largest"] == {"ring": 8 * 64, "gather": num_ranks * 8 * 64}

"""Any layout goes on from the checkpoint of any other, in every form that training saves."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.parallel.parity import TOLERANCE_FP32

WORKER = Path(__file__).with_name("reshard_worker.py")
LAYOUTS: dict[str, Any] = runpy.run_path(str(WORKER))["LAYOUTS"]
PAIRS = [(one, other) for one in LAYOUTS for other in LAYOUTS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout did, by work and layout."""
    folder = tmp_path_factory.mktemp("reshard")
    ran = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {
        work: {
            layout: json.loads((folder / f"{layout}.{work}.json").read_text()) for layout in LAYOUTS
        }
        for work in ("save", "resume")
    }


def test_every_pair_reads_the_same_bits(results: dict[str, Any]) -> None:
    forms, rewritten = set(), []
    for here, there in PAIRS:
        read = results["resume"][here][there]
        assert read["names"], (here, there)
        assert not read["different"], (here, there, read)
        forms.add((there, read["form"]))
        rewritten += [read["same_bytes"]] if read["form"] == "safetensors" else []
    assert len(forms) == 3 * len(LAYOUTS)  # each layout's files in each form were read
    assert len(rewritten) > len(LAYOUTS)
    assert all(rewritten)  # saved again in another layout: the same files, to the byte
    # Weights, two moments, their step and the average.
    num = {saved["tensors"] for saved in results["save"].values()}
    assert len(num) == 1
    assert num.pop() % 5 == 0


def test_what_follows_is_the_unbroken_run(results: dict[str, Any]) -> None:
    for here, there in PAIRS:
        unbroken = results["save"][there]["after"]
        resumed = results["resume"][here][there]["after"]
        assert len(resumed) == len(unbroken) == 3
        if here == there:
            assert resumed == unbroken, here
        gaps = [abs(a - b) / abs(b) for a, b in zip(resumed, unbroken, strict=True)]
        assert max(gaps) <= TOLERANCE_FP32, (here, there, gaps)
    for saved in results["save"].values():
        assert saved["before"][0] != saved["after"][0]  # the weights did move

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
from carillon.engine.train.parity.decoder import LEAST_MARGIN

WORKER = Path(__file__).with_name("reshard_worker.py")
LAYOUTS: dict[str, dict[str, Any]] = runpy.run_path(str(WORKER.with_name("reshard_replicas.py")))[
    "LAYOUTS"
]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout did, by kind of model, work and layout."""
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
        kind: {
            work: {
                layout: json.loads((folder / kind / f"{layout}.{work}.json").read_text())
                for layout in layouts
            }
            for work in ("save", "resume")
        }
        for kind, layouts in LAYOUTS.items()
    }


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_pair_reads_the_same_bits(every: dict[str, Any], kind: str) -> None:
    results, forms, rewritten = every[kind], set(), []
    (names,) = {tuple(saved["names"]) for saved in results["save"].values()}
    # Weights, two moments, their step and the average; and what no gradient moves.
    biases = [name for name in names if name.endswith(".router.bias")]
    assert (len(names) - len(biases)) % 5 == 0
    for here in LAYOUTS[kind]:
        for there in LAYOUTS[kind]:
            read = results["resume"][here][there]
            found: set[str] = set()
            for of_process, different in read["compared"]:
                assert not different, (here, there, different)
                found.update(of_process)
            assert found == set(names), (here, there)
            forms.add((there, read["form"]))
            rewritten += [] if read["same_bytes"] is None else [read["same_bytes"]]
    assert len(forms) == 3 * len(LAYOUTS[kind])  # each layout's files in each form were read
    # Each saved another's again: the same files, to the byte.
    assert rewritten == [True] * len(LAYOUTS[kind])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_follows_is_the_unbroken_run(every: dict[str, Any], kind: str) -> None:
    results = every[kind]
    for here in LAYOUTS[kind]:
        for there in LAYOUTS[kind]:
            unbroken = results["save"][there]["after"]
            resumed = results["resume"][here][there]["after"]
            assert len(resumed) == len(unbroken) == 2
            if here == there:
                assert resumed == unbroken, here
            gaps = [abs(a - b) / abs(b) for a, b in zip(resumed, unbroken, strict=True)]
            assert max(gaps) <= TOLERANCE_FP32, (here, there, gaps)
    for saved in results["save"].values():
        assert saved["before"][0] != saved["after"][0]  # the weights did move


def test_the_biases_of_routers_are_among_them(every: dict[str, Any]) -> None:
    for saved in every["decoder"]["save"].values():
        biases = [name for name in saved["names"] if name.endswith(".router.bias")]
        assert len(biases) == saved["moved"] == 2
    assert every["decoder"]["save"]["one"]["margin"] > LEAST_MARGIN  # else rounding would choose

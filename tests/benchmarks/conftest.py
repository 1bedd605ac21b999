"""A run of the GPU suite on the CPU: one real operator, one that fails in every way, training, and
tests that fail."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carillon import _C

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu"
RunSuite = Callable[..., subprocess.CompletedProcess[str]]
TEST = """
import os, signal, time

def test_passes():
    assert True

def test_fails():
    assert 1 == 2

def test_crashes():
    os.kill(os.getpid(), signal.SIGKILL)

def test_loses_the_context():
    raise RuntimeError("CUDA error: device-side assert triggered")

def test_comes_after():
    assert True
"""


@pytest.fixture(scope="session")
def run_suite() -> RunSuite:
    """Calls run.sh with options."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        # The suite itself chooses how Triton runs.
        environment.pop("TRITON_INTERPRET", None)
        command = ["bash", str(SUITE / "run.sh"), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    return run


@pytest.fixture(scope="session")
def dry_run(run_suite: RunSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTDIR of a run with a real operator and a faulty one, training, and tests that fail."""
    folder = tmp_path_factory.mktemp("suite")
    cases, tests, wheels = folder / "cases", folder / "tests", folder / "wheels"
    for made in (cases, tests / "faulty", wheels):
        made.mkdir(parents=True)
    for name in ("grouped_mm.py", "training.py"):
        shutil.copy(SUITE / "cases" / name, cases)
    shutil.copy(Path(__file__).parent / "faulty_cases" / "faulty.py", cases)
    (tests / "faulty" / "test_faulty.py").write_text(TEST)
    (wheels / "ninja-1.0-py3-none-any.whl").write_text("not a wheel")
    done = run_suite(
        *("--dry-run", "--module", str(_C.__file__), "--cases", str(cases), "--tests", str(tests)),
        *("--wheels", str(wheels), "--case-seconds", "6", str(folder / "out")),
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def summary(dry_run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((dry_run / "summary.json").read_text())
    return content

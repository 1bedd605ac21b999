"""Workers of several processes: scripts beside these tests, started by torchrun."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 300


def run_worker_of(name: str, num_processes: int, folder: Path) -> Any:
    """What rank 0 of the script wrote as JSON to the file that it was given."""
    out = folder / "results.json"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    worker = str(Path(__file__).with_name(name))
    command = [sys.executable, *launch, worker, str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    return lambda name, size: run_worker_of(name, size, tmp_path_factory.mktemp("worker"))

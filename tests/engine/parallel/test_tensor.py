"""Tensor parallelism: the step of one process, to 1e-5 in fp32, with a share of weights each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carillon.engine.parallel.parity import TOLERANCE_FP32

WORKER = Path(__file__).with_name("tensor_worker.py")


@pytest.mark.parametrize(("world_size", "num_cases"), [(2, 8), (4, 24)])
def test_tensor_parallel_layouts_give_the_step_of_one_process(
    tmp_path: Path, world_size: int, num_cases: int
) -> None:
    out = tmp_path / "errors.json"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    ran = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    assert len(results) == num_cases
    errors = ("gradient_error", "loss_error", "norm_error")
    worse = [r for r in results if max(r[error] for error in errors) > TOLERANCE_FP32]
    assert not worse, worse
    assert max(r["gradient_error"] for r in results) > 0  # rounding differs: it was really split
    for result in results:  # all but norms, positions, patches and projections is split
        num = int(result["case"][2]) * (2 if "fsdp" in result["case"] else 1)
        assert result["share"] < 1 / num + 0.25, result

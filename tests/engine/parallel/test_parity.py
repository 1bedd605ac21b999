"""One step, every data layout: loss and gradients of one process, to 1e-5 in fp32."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carillon.engine.parallel.parity import TOLERANCE_FP32, gradient_errors

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.mark.parametrize(("world_size", "num_cases"), [(2, 38), (4, 46)])
def test_layouts_give_the_step_of_one_process(
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
    worse = [r for r in results if max(r["gradient_error"], r["loss_error"]) > TOLERANCE_FP32]
    assert not worse, worse
    assert max(r["gradient_error"] for r in results) > 0  # rounding differs: it was really split


def test_the_measure_sees_a_wrong_gradient_and_forgives_a_zero_one() -> None:
    reference = {"a": torch.ones(100), "key_bias": torch.full((10,), 1e-9)}
    same = gradient_errors({"a": torch.ones(100), "key_bias": torch.zeros(10)}, reference)
    assert same["a"] == 0.0
    assert same["key_bias"] < TOLERANCE_FP32
    wrong = gradient_errors({"a": torch.ones(100) * 1.001, "key_bias": torch.zeros(10)}, reference)
    assert wrong["a"] == pytest.approx(1e-3, rel=1e-4)
    with pytest.raises(ValueError, match="different tensors"):
        gradient_errors({"a": torch.ones(1)}, reference)

"""Expert parallelism: the step of one process, to 1e-5 in fp32, with a share of experts each."""

from collections.abc import Callable
from typing import Any

import pytest

from carillon.engine.parallel.parity import TOLERANCE_FP32
from carillon.engine.train.parity.decoder import LEAST_MARGIN


@pytest.mark.parametrize(("world_size", "num_cases"), [(2, 24), (4, 40)])
def test_expert_parallel_layouts_give_the_step_of_one_process(
    run_worker: Callable[[str, int], Any], world_size: int, num_cases: int
) -> None:
    results: list[dict[str, Any]] = run_worker("expert_worker.py", world_size)
    assert len(results) == num_cases
    assert min(r["margin"] for r in results) > LEAST_MARGIN
    errors = ("gradient_error", "loss_error", "norm_error", "log_error")
    worse = [r for r in results if max(r[error] for error in errors) > TOLERANCE_FP32]
    assert not worse, worse
    assert max(r["gradient_error"] for r in results) > 0  # rounding differs: it was really split
    for result in results:
        assert result["experts_share"] == pytest.approx(1 / _shares(result["case"])), result
        assert result["biases_equal"] == ("sigmoid" in result["case"]) * _mixtures(result), result
        assert (result["dropped"] > 0.01) == ("capacity" in result["case"]), result


def _shares(case: str) -> int:
    """Every axis but replicas splits the experts."""
    return 4 if case.startswith(("ep4", "ep2 fsdp2", "ep2 tp2")) else 2


def _mixtures(result: dict[str, Any]) -> int:
    return 1 if "capacity" in result["case"] else 2

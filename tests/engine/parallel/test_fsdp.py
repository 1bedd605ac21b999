"""FSDP's policies: what weights are gathered in, what gradients are summed in, what stays fp32."""

from collections.abc import Callable
from typing import Any

import pytest

from carillon.engine.config import UserError, build
from carillon.engine.parallel.config import DistributedConfig

BF16_ROUNDING = 2.0**-9  # half a unit in the last place, relative


@pytest.fixture(scope="module")
def cases(run_worker: Callable[[str, int], Any]) -> dict[str, Any]:
    return dict(run_worker("fsdp_worker.py", 2))


@pytest.mark.parametrize("name", ["gather bf16", "gather and reduce bf16"])
def test_blocks_are_gathered_in_bf16_and_nothing_else_is(cases: dict[str, Any], name: str) -> None:
    for parameter, dtype in cases[name]["dtypes"].items():
        assert dtype == ("torch.bfloat16" if ".blocks." in parameter else "torch.float32")
    assert cases[name]["kept"] == ["torch.float32"]
    assert set(cases["all fp32"]["dtypes"].values()) == {"torch.float32"}


def test_gradients_are_summed_in_what_was_asked_for(cases: dict[str, Any]) -> None:
    whole = cases["all fp32"]["reduced"]["torch.float32"]
    assert cases["gather bf16"]["reduced"] == {"torch.float32": whole}
    for name in ("gather and reduce bf16", "replicas that reduce in bf16"):
        reduced = cases[name]["reduced"]
        assert reduced["torch.float32"] + 2 * reduced["torch.bfloat16"] == pytest.approx(
            whole, rel=0.01
        )


def test_gradients_move_by_the_rounding_of_bf16(cases: dict[str, Any]) -> None:
    """The step computes in bf16 in any case, so a copy in bf16 is what is multiplied anyway."""
    assert all(0 < case["error"] < BF16_ROUNDING for case in cases.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp32", "fsdp_gather": "bf16"}, "fsdp_gather: bf16 given, but precision"),
        ({"fsdp_offload": True}, "fsdp_offload: it frees a GPU's memory and there is no GPU"),
    ],
)
def test_policies_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DistributedConfig, values, source="test")

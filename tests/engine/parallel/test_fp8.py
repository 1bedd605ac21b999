"""8-bit products in layouts follow those of one process, in bounds of what their roundings are."""

from collections.abc import Callable
from typing import Any

import pytest

RECIPES = ["tensorwise", "rowwise", "blockwise", "delayed"]


@pytest.fixture(scope="module")
def found(run_worker: Callable[[str, int], Any]) -> dict[str, Any]:
    return dict(run_worker("fp8_worker.py", 2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_split_layer_is_that_of_one_process_but_for_rounding(
    found: dict[str, Any], recipe: str
) -> None:
    """Each figure is |difference| over its bound, which fp8_worker.layer_case derives."""
    columns, rows = (case for case in found["layers"] if case["recipe"] == recipe)
    for case in (columns, rows):
        assert max(case[name] for name in ("y", "x", "weight")) <= 1, case
    assert columns["x"] > 0  # they were really summed over two processes
    assert rows["y"] > 0
    if recipe in ("tensorwise", "delayed"):  # what needs no sum has the same codes and bits
        assert columns["y"] == columns["weight"] == rows["x"] == rows["weight"] == 0


def test_stages_give_the_bits_of_one_process(found: dict[str, Any]) -> None:
    """Of the same microbatches, tables of amaxes included; and no product is computed twice, not
    where a schedule takes the gradients of inputs and weights apart."""
    stages = found["stages"]
    assert len(stages) == 14
    for case in stages:
        assert case["missing"] == case["odd"] == [], case
        products, reference = case["products"]
        assert products == reference > 0, case
    empty = [case["case"] for case in stages if case["layers_here"] == 0]
    assert empty == ["dual encoder delayed zbv 1", "decoder delayed zbv 1"]


@pytest.mark.parametrize("layout", ["tp2", "tp2 by tokens", "fsdp2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_a_layout_are_as_near_as_8_bits_are(
    found: dict[str, Any], recipe: str, layout: str
) -> None:
    """Roundings that fall otherwise are two of the same size: each is as far from float32 as one
    process's, so they are within the sum of both from each other."""
    (case,) = (c for c in found["models"] if (c["recipe"], c["layout"]) == (recipe, layout))
    assert case["layers"] == 16
    assert 0 < case["moved"] < 2 * case["fp8_itself"], case
    assert case["loss"] < 0.05
    if layout == "fsdp2" and recipe != "tensorwise":  # whose scale is that of own samples
        assert case["loss"] < 1e-6
        assert case["moved"] < 0.1 * case["fp8_itself"]


@pytest.mark.parametrize(
    ("layout", "bound"), [("tp2", 2.0**-3), ("tp2 by tokens", 2.0**-3), ("fsdp2", 2.0**-8)]
)
def test_delayed_scales_are_the_same_on_all_processes(
    found: dict[str, Any], layout: str, bound: float
) -> None:
    """And those of one process: within a rounding of the largest value of e4m3 where tensors of
    the first step differ by roundings, to bfloat16's where they do not."""
    (case,) = (c for c in found["models"] if (c["recipe"], c["layout"]) == ("delayed", layout))
    assert case["ranks_agree"]
    assert case["scales"] <= bound

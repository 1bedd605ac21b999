"""Delayed scaling: whose amaxes scale a step, what does not count, and its state."""

import pytest
import torch
from torch import Tensor, nn

from carillon.engine.nn.fp8 import Fp8Linear
from carillon.engine.nn.fp8_layers import delayed_scaling, full_products, to_fp8
from carillon.engine.nn.fp8_scaling import DelayedScaling
from carillon.kernels.fp8_cast.reference import FP8_MAX, fp8_cast

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def model(length: int = 2) -> tuple[nn.Module, DelayedScaling]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False))
    whole = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    to_fp8(whole, "delayed", history=length)
    table = delayed_scaling(whole)
    assert table is not None
    return block, table


def inputs(factor: float) -> Tensor:
    return factor * torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def step(block: nn.Module, factor: float) -> Tensor:
    y: Tensor = block(inputs(factor))
    y.float().square().sum().backward()
    return y.detach()


def test_a_step_is_scaled_by_the_amaxes_of_the_steps_before() -> None:
    block, table = model()
    first = block[0]  # type: ignore[index]
    for factor, largest in ((3.0, None), (1.0, 3.0), (8.0, 3.0), (1.0, 8.0), (1.0, 8.0), (1, 1)):
        x = inputs(factor)
        scale = None if largest is None else (largest * inputs(1.0)).abs().max() / FP8_MAX[E4M3]
        x_MK = fp8_cast(x, "tensorwise", E4M3, scale)
        weight_NK = fp8_cast(first.weight, "tensorwise", E4M3)
        expected = torch._scaled_mm(
            x_MK.row,
            weight_NK.row.t(),
            scale_a=x_MK.row_scale,
            scale_b=weight_NK.row_scale,
            out_dtype=torch.bfloat16,
        )
        assert torch.equal(first(x), expected), (factor, largest)
        step(block, factor)
        table.end_step(counts=True)


def test_gradients_have_a_history_of_their_own() -> None:
    block, table = model()
    y = step(block, 1.0)
    table.end_step(counts=True)
    scales = table.state_tensors()
    gradient = (2 * y.float()).to(torch.bfloat16).abs().max().float()
    assert scales["blocks.0.1.backward.scale"].item() == gradient / FP8_MAX[E5M2]
    assert scales["blocks.0.0.backward.scale"].item() not in (1.0, gradient / FP8_MAX[E5M2])


def test_what_is_skipped_or_multiplied_in_full_does_not_count() -> None:
    block, table = model()
    step(block, 1.0)
    table.end_step(counts=True)
    before = {name: value.clone() for name, value in table.state_tensors().items()}
    step(block, 1e6)
    table.end_step(counts=False)
    with full_products(block):
        step(block, 1e6)
        assert torch.equal(block(inputs(2.0)), block[1].forward(block[0].forward(inputs(2.0))))  # type: ignore[index]
        assert block(inputs(2.0)).dtype is torch.float32
    assert not table.seen.any()
    assert block(inputs(2.0)).dtype is torch.bfloat16
    after = table.state_tensors()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_one_value_that_is_not_finite_leaves_the_others_scales() -> None:
    block, table = model(length=1)
    step(block, 1.0)
    table.end_step(counts=True)
    scale = table.state_tensors()["blocks.0.0.forward.scale"].clone()
    x = inputs(2.0)
    x[3, 4] = torch.inf
    block(x)
    table.end_step(counts=True)
    found = table.state_tensors()["blocks.0.0.forward.scale"]
    assert found[0] == scale[0]  # an amax of infinity is not counted
    assert found[1] == scale[1]  # and that of the weight is what it was


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_goes_on_from_its_state(steps: int) -> None:
    factors = (1.0, 5.0, 0.5, 2.0, 1.0)
    block, table = model()
    results = []
    for index, factor in enumerate(factors):
        if index == steps:
            tensors = {name: value.clone() for name, value in table.state_tensors().items()}
            state = table.state_dict()
        results.append(step(block, factor))
        table.end_step(counts=True)
    other, resumed = model()
    for name, value in resumed.state_tensors().items():
        value.copy_(tensors[name])
    resumed.load_state_dict(state)
    for factor, expected in zip(factors[steps:], results[steps:], strict=True):
        assert torch.equal(step(other, factor), expected)
        resumed.end_step(counts=True)
    for name, value in resumed.state_tensors().items():
        assert torch.equal(value, table.state_tensors()[name]), name


def test_other_recipes_have_no_history() -> None:
    block = nn.Sequential(nn.Linear(32, 48))
    whole = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    to_fp8(whole, "tensorwise")
    assert isinstance(block[0], Fp8Linear)
    assert delayed_scaling(whole) is None

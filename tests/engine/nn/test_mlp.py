"""The perceptron and its activations against their formulas."""

import math

import pytest
import torch

from carillon.engine.nn.mlp import Activation, Mlp, quick_gelu


def test_quick_gelu_is_its_formula() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    want = x / (1 + (-1.702 * x).exp())
    assert (quick_gelu(x) - want).abs().max() < 1e-15  # float64 rounding


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_mlp_is_linear_activation_linear(activation: Activation) -> None:
    mlp = Mlp(6, 10, activation=activation, out_width=4).double()
    mlp.init_weights(fc1_std=0.5, fc2_std=0.5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = x @ mlp.fc1.weight.T
    gate = 1 / (1 + (-1.702 * h).exp())
    if activation == "gelu":
        gate = (1 + torch.erf(h / math.sqrt(2))) / 2
    want = (h * gate) @ mlp.fc2.weight.T
    assert (mlp(x) - want).abs().max() < 1e-13  # float64 rounding


def test_mlp_without_bias_has_two_weights() -> None:
    assert [name for name, _ in Mlp(6, 10, bias=False).named_parameters()] == [
        "fc1.weight",
        "fc2.weight",
    ]

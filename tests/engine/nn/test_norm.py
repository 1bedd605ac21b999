"""LayerNorm against its formula, and its precision under autocast."""

import pytest
import torch

from carillon.engine.nn.norm import LayerNorm


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_formula(bias: bool) -> None:
    norm = LayerNorm(7, eps=1e-5, bias=bias).double()
    norm.init_weights()
    with torch.no_grad():
        for offset, parameter in enumerate(norm.parameters()):
            parameter.add_(torch.linspace(-1, 1, 7) + offset)
    x = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centred = x - x.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    if norm.bias is not None:
        want = want + norm.bias
    assert (norm(x) - want).abs().max() < 1e-13  # float64 rounding


def test_statistics_stay_fp32_under_autocast() -> None:
    norm = LayerNorm(64)
    norm.init_weights()
    x = 1000 + torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)  # in bf16, 1000 + noise would be multiples of 4
    assert y.dtype == torch.float32
    assert torch.equal(y, norm(x))

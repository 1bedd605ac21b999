"""8-bit products against the same codes multiplied in float64, and what is converted."""

import math

import pytest
import torch
from torch import Tensor, nn

from carillon.engine.nn.fp8 import Fp8Linear, Recipe, to_fp8
from carillon.engine.nn.transformer import Block, BlockShape
from carillon.kernels.fp8_cast.reference import fp8_cast


def linear(recipe: Recipe, in_features: int = 48, out_features: int = 32) -> Fp8Linear:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(in_features, out_features))
    to_fp8([layer], recipe)
    converted = layer[0]
    assert isinstance(converted, Fp8Linear)
    return converted


def codes(x: Tensor, recipe: Recipe, dtype: torch.dtype, *, column: bool = False) -> Tensor:
    """The values that x, or its transpose, is rounded to."""
    copies = fp8_cast(x, recipe, dtype, column=True)
    code, scale = (copies.column, copies.column_scale) if column else (copies.row, copies.row_scale)
    return code.double() * scale.double()


def assert_rounded(found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Within half a unit of bfloat16's 8 bits, and what float32 sums of up to 80 terms lose:
    `magnitude` is the sum of their magnitudes."""
    bound = 2.0**-8 * exact.abs() + 80 * 2.0**-24 * magnitude
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("rows", [80, 7, 1])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_are_those_of_the_codes(recipe: Recipe, rows: int) -> None:
    layer = linear(recipe)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 48, generator=generator).requires_grad_()
    grad = torch.randn(rows, 32, generator=generator).to(torch.bfloat16)
    y = layer(x) - layer.bias.to(torch.bfloat16)
    assert y.dtype is torch.bfloat16
    product = layer(x)
    torch.autograd.backward(product, grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None

    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    given, weight = x.detach(), layer.weight.detach()
    x_MK, weight_NK = codes(given, recipe, e4m3), codes(weight, recipe, e4m3)
    exact = x_MK @ weight_NK.T
    with torch.no_grad():
        layer.bias.zero_()
        assert_rounded(layer(given), exact, x_MK.abs() @ weight_NK.abs().T)
    grad_MN = codes(grad, recipe, e5m2)
    weight_KN = codes(weight, recipe, e4m3, column=True)
    assert_rounded(x.grad, grad_MN @ weight_KN.T, grad_MN.abs() @ weight_KN.abs().T)
    padded = torch.zeros(math.ceil(rows / 16) * 16, 32, dtype=torch.bfloat16)
    padded[:rows] = grad
    wide = torch.zeros(len(padded), 48)
    wide[:rows] = given
    grad_NM = codes(padded, recipe, e5m2, column=True)
    x_KM = codes(wide, recipe, e4m3, column=True)
    assert_rounded(layer.weight.grad, grad_NM @ x_KM.T, grad_NM.abs() @ x_KM.abs().T)
    assert torch.equal(layer.bias.grad, grad.float().sum(0).to(torch.bfloat16).float())


def test_leading_dims_and_no_rows() -> None:
    layer = linear("tensorwise")
    x = torch.randn(2, 3, 48)
    assert torch.equal(layer(x).reshape(6, 32), layer(x.reshape(6, 48)))
    assert layer(torch.empty(0, 5, 48)).shape == (0, 5, 32)


def test_linears_of_blocks_are_converted_and_nothing_else() -> None:
    shape = BlockShape(
        width=32, num_heads=2, mlp_width=64, activation="gelu", qk_norm=True, causal=False
    )
    block, odd = Block(shape), nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24))
    names = list(block.state_dict())
    to_fp8([block, odd], "rowwise")
    converted = [name for name, module in block.named_modules() if type(module) is Fp8Linear]
    assert converted == ["attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2"]
    assert list(block.state_dict()) == names
    assert not any(isinstance(module, Fp8Linear) for module in odd)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_block_learns_as_in_full_precision(recipe: Recipe) -> None:
    """Gradients point where those of float32 do, with what 8 bits of a value leave of it."""
    shape = BlockShape(
        width=64, num_heads=2, mlp_width=128, activation="gelu", qk_norm=False, causal=False
    )
    torch.manual_seed(0)
    block = Block(shape)
    block.attention.init_weights(qkv_std=0.125, out_std=0.125)
    block.mlp.init_weights(fc1_std=0.1, fc2_std=0.1)
    for norm in (block.norm1, block.norm2):
        norm.init_weights()
    x = torch.randn(4, 17, 64)
    gradients = []
    for converted in (False, True):
        if converted:
            to_fp8([block], recipe)
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=converted):
            block(x).float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in block.named_parameters()})  # type: ignore[union-attr]
    for name in ("attention.qkv.weight", "attention.out.weight", "mlp.fc1.weight"):
        full, narrow = gradients[0][name].flatten(), gradients[1][name].flatten()
        assert torch.cosine_similarity(full, narrow, dim=0) > 0.99, name

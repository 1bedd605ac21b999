"""8-bit products against the same codes multiplied in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from carillon.engine.nn.fp8 import Fp8Linear
from carillon.engine.nn.fp8_layers import to_fp8
from carillon.engine.nn.fp8_scaling import Recipe
from carillon.engine.nn.transformer import Block, BlockShape
from carillon.kernels.fp8_cast.reference import fp8_cast

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ("tensorwise", "rowwise", "blockwise", "delayed")


class Expected(NamedTuple):
    """How inputs, weights and gradients are to be cast."""

    values: str
    weights: str
    gradient_dtype: torch.dtype


EXPECTED = {
    "tensorwise": Expected("tensorwise", "tensorwise", E5M2),
    "rowwise": Expected("rowwise", "rowwise", E5M2),
    "blockwise": Expected("1x128", "128x128", E4M3),
    "delayed": Expected("tensorwise", "tensorwise", E5M2),  # of itself in its first step
}


def linear(recipe: Recipe, in_features: int = 48, out_features: int = 32) -> Fp8Linear:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(in_features, out_features))
    to_fp8(nn.ModuleDict({"blocks": nn.ModuleList([block])}), recipe)
    converted = block[0]
    assert isinstance(converted, Fp8Linear)
    return converted


def codes(x: Tensor, granularity: str, dtype: torch.dtype, *, column: bool = False) -> Tensor:
    """The values that x, or its transpose, is rounded to."""
    copies = fp8_cast(x, granularity, dtype, column=True)
    code, scale = (copies.column, copies.column_scale) if column else (copies.row, copies.row_scale)
    if scale.dim() == 2 and "128" in granularity:
        rows = 1 if granularity == "1x128" else 128
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(128, 1)
        scale = scale[: len(code), : code.shape[1]]
    return code.double() * scale.double()


def assert_rounded(found: Tensor, left: Tensor, right: Tensor) -> None:
    """`found` is left @ right.T within half a unit of bfloat16's 8 bits, and what float32 sums
    lose of the terms' magnitudes; the values given back of a block lose 2^-24 each."""
    exact, magnitude = left @ right.T, left.abs() @ right.abs().T
    bound = 2.0**-8 * exact.abs() + (left.shape[1] + 2) * 2.0**-24 * magnitude
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("rows", "sides"), [(80, (48, 32)), (7, (48, 32)), (150, (272, 144))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_codes(recipe: Recipe, rows: int, sides: tuple[int, int]) -> None:
    layer, cast = linear(recipe, *sides), EXPECTED[recipe]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, sides[0], generator=generator)
    x[:, :20] *= 100  # blocks differ
    x.requires_grad_()
    grad = torch.randn(rows, sides[1], generator=generator).to(torch.bfloat16)
    product = layer(x)
    assert product.dtype is torch.bfloat16
    torch.autograd.backward(product, grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None

    given, weight = x.detach(), layer.weight.detach()
    with torch.no_grad():
        layer.bias.zero_()
        x_MK, weight_NK = codes(given, cast.values, E4M3), codes(weight, cast.weights, E4M3)
        assert_rounded(layer(given), x_MK, weight_NK)
    grad_MN = codes(grad, cast.values, cast.gradient_dtype)
    assert_rounded(x.grad, grad_MN, codes(weight, cast.weights, E4M3, column=True))
    padded = torch.zeros(math.ceil(rows / 16) * 16, sides[1], dtype=torch.bfloat16)
    padded[:rows] = grad
    wide = torch.zeros(len(padded), sides[0])
    wide[:rows] = given
    grad_NM = codes(padded, cast.values, cast.gradient_dtype, column=True)
    assert_rounded(layer.weight.grad, grad_NM, codes(wide, cast.values, E4M3, column=True))
    assert torch.equal(layer.bias.grad, grad.float().sum(0).to(torch.bfloat16).float())


def test_leading_dims_and_no_rows() -> None:
    layer = linear("tensorwise")
    x = torch.randn(2, 3, 48)
    assert torch.equal(layer(x).reshape(6, 32), layer(x.reshape(6, 48)))
    assert layer(torch.empty(0, 5, 48)).shape == (0, 5, 32)


@pytest.mark.parametrize("recipe", RECIPES)
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
            to_fp8(nn.ModuleDict({"blocks": nn.ModuleList([block])}), recipe)
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=converted):
            block(x).float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in block.named_parameters()})  # type: ignore[union-attr]
    for name in ("attention.qkv.weight", "attention.out.weight", "mlp.fc1.weight"):
        full, narrow = gradients[0][name].flatten(), gradients[1][name].flatten()
        assert torch.cosine_similarity(full, narrow, dim=0) > 0.99, name

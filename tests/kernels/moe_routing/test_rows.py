"""moe_permute and moe_unpermute: each provider against sums in float64, values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("moe_permute")
DTYPES = [torch.float32, torch.bfloat16]
# Tokens, experts, k, width, capacity: one of each; widths beside a vector's; dropped slots; more
# columns than a block of 1024 only for providers that are compiled.
CASES = [(1, 1, 1, 1, None), (19, 4, 2, 37, None), (40, 6, 3, 130, 9), (9, 16, 11, 64, None)]


def plan_of(num_tokens: int, num_experts: int, k: int, capacity: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    indices = scores.topk(k, dim=1).indices.int()
    return list(resolve("moe_plan", "cpu", "reference")(indices, num_experts, 8, capacity)[1:])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(op: str, got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCES[op, got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance.atol, rtol=tolerance.rtol)


def permutation(row_to_slot: Tensor, num_slots: int) -> Tensor:
    """The (R, S) matrix of zeros and ones that takes slots to rows, in float64."""
    matrix = torch.zeros(len(row_to_slot), num_slots, dtype=torch.float64)
    for row, slot in enumerate(row_to_slot.tolist()):
        if slot >= 0:
            matrix[row, slot] = 1
    return matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_permute(
    kernel: Kernels, dtype: torch.dtype, case: tuple[int, int, int, int, int | None]
) -> None:
    num_tokens, num_experts, k, width, capacity = case
    row_to_slot, slot_to_row = plan_of(num_tokens, num_experts, k, capacity)
    x = randn(num_tokens, width, dtype=dtype).requires_grad_()
    rows = kernel("moe_permute")(x, row_to_slot, slot_to_row)
    matrix = permutation(row_to_slot, num_tokens * k)
    wanted = matrix @ x.detach().double().repeat_interleave(k, 0)
    assert torch.equal(rows.double(), wanted)
    grad = randn(*rows.shape, dtype=dtype, seed=1)
    rows.backward(grad)
    assert x.grad is not None
    assert_close("moe_permute", x.grad, (matrix.T @ grad.double()).view(-1, k, width).sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpermute(
    kernel: Kernels, dtype: torch.dtype, case: tuple[int, int, int, int, int | None]
) -> None:
    num_tokens, num_experts, k, width, capacity = case
    maps = plan_of(num_tokens, num_experts, k, capacity)
    rows = randn(len(maps[0]), width, dtype=dtype).requires_grad_()
    weights = randn(num_tokens, k, seed=2).requires_grad_()
    out = kernel("moe_unpermute")(rows, weights, *maps)
    exact_rows = rows.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_()
    slots = permutation(maps[0], num_tokens * k).T @ exact_rows
    wanted = (slots.view(num_tokens, k, width) * exact_weights[..., None]).sum(1)
    assert_close("moe_unpermute", out, wanted)
    grad = randn(num_tokens, width, dtype=dtype, seed=1)
    out.backward(grad)
    wanted.backward(grad.double())
    for got, exact in ((rows.grad, exact_rows.grad), (weights.grad, exact_weights.grad)):
        assert got is not None
        assert exact is not None
        assert_close("moe_unpermute", got, exact)


@pytest.mark.parametrize("width", [3200, 3232])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_and_large_rows(instruction_set: str, dtype: torch.dtype, width: int) -> None:
    """Results large enough to be written past the caches, also where a step is not whole lines."""
    num_tokens, k = 700, 2
    maps = plan_of(num_tokens, 5, k, None)
    x = randn(num_tokens, width, dtype=dtype)
    rows = resolve("moe_permute", "cpu", "native")(x, *maps)
    assert rows.nbytes >= 8 << 20
    token_R = maps[0].clamp(min=0).long() // k
    assert torch.equal(rows, x[token_R] * (maps[0] >= 0)[:, None].to(dtype))
    weights = randn(num_tokens, k).requires_grad_()
    rows.requires_grad_()
    out = resolve("moe_unpermute", "cpu", "native")(rows, weights, *maps)
    assert_close("moe_unpermute", out, x.double() * weights.double().sum(1, keepdim=True))
    grad = randn(num_tokens, width, dtype=dtype, seed=3)
    out.backward(grad)
    assert rows.grad is not None
    weight_R = weights.detach().flatten()[maps[0].clamp(min=0)] * (maps[0] >= 0)
    assert_close("moe_unpermute", rows.grad, grad.double()[token_R] * weight_R.double()[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 31, 64, 67, 131])
def test_every_width_beside_a_vector(instruction_set: str, dtype: torch.dtype, width: int) -> None:
    num_tokens, k = 5, 3
    maps = plan_of(num_tokens, 4, k, None)
    rows = randn(len(maps[0]), width, dtype=dtype)
    weights, grad = randn(num_tokens, k, seed=2), randn(num_tokens, width, dtype=dtype, seed=3)
    out = resolve("moe_unpermute", "cpu", "native")(rows, weights, *maps)
    row_TK = maps[1].long()
    taken_TKD = rows.double()[row_TK]
    assert_close("moe_unpermute", out, (taken_TKD * weights[..., None]).sum(1))
    backward = torch.ops.carillon.moe_unpermute_backward
    grad_rows, grad_weights = backward(grad, rows, weights, *maps)
    wanted = weights.double()[..., None] * grad.double()[:, None]
    assert_close("moe_unpermute", grad_rows[row_TK], wanted)
    assert_close("moe_unpermute", grad_weights, (taken_TKD * grad.double()[:, None]).sum(2))


def test_dropped_rows_leave_no_trace(kernel: Kernels) -> None:
    """All dropped for the last token: zeros, whatever the rows hold."""
    indices = torch.tensor([[0], [0], [0]], dtype=torch.int32)
    _, *maps = kernel("moe_plan")(indices, 2, 2, 2)
    rows = torch.full((len(maps[0]), 3), float("inf"))
    out = kernel("moe_unpermute")(rows, torch.ones(3, 1), *maps)
    assert out[:2].isinf().all()
    assert out[2].tolist() == [0.0] * 3


def test_not_a_number_passes_through_as_one(kernel: Kernels) -> None:
    maps = plan_of(4, 3, 2, None)
    x = torch.full((4, 5), float("nan"), dtype=torch.bfloat16)
    rows = kernel("moe_permute")(x, *maps)
    out = kernel("moe_unpermute")(rows, torch.ones(4, 2), *maps)
    assert out.isnan().all()


@pytest.mark.parametrize(("num_tokens", "width"), [(0, 4), (5, 0)])
def test_empty(kernel: Kernels, num_tokens: int, width: int) -> None:
    maps = plan_of(num_tokens, 3, 2, None)
    x = torch.zeros(num_tokens, width, requires_grad=True)
    weights = torch.zeros(num_tokens, 2, requires_grad=True)
    rows = kernel("moe_permute")(x, *maps)
    out = kernel("moe_unpermute")(rows, weights, *maps)
    assert rows.shape == (len(maps[0]), width)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_strided_input(kernel: Kernels) -> None:
    maps = plan_of(6, 3, 2, None)
    op = kernel("moe_permute")
    for x in (randn(12, 20)[::2, 1::2], randn(10, 6).T, randn(1, 4).expand(6, -1)):
        assert not x.is_contiguous()
        assert torch.equal(op(x, *maps), op(x.contiguous(), *maps))
    x = randn(6, 4).requires_grad_()
    op(x, *maps).sum().backward()  # a gradient with strides of 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((6, 4), 2.0))


def test_one_and_two_threads_agree_to_the_bit() -> None:
    maps = plan_of(300, 8, 3, 100)
    x, weights = randn(300, 70).requires_grad_(), randn(300, 3).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            x.grad = weights.grad = None
            rows = resolve("moe_permute", "cpu", "native")(x, *maps)
            out = resolve("moe_unpermute", "cpu", "native")(rows, weights, *maps)
            out.square().sum().backward()
            results.append((rows, out, x.grad, weights.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

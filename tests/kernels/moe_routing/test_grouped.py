"""grouped_mm and gather_grouped_mm: each provider against products in float64, and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("grouped_mm")
DTYPES = [torch.float32, torch.bfloat16]
# Rows an expert, rows after the last, input and output width: an expert without rows first, last
# and between; segments that no tile divides, and one of more rows than a tile; odd widths.
CASES = [
    ((3,), 0, 1, 1),
    ((0, 5, 0, 0, 17, 0), 4, 24, 40),
    ((130, 16, 7), 3, 33, 19),
    ((16, 32, 16), 0, 64, 128),
]


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def definition(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Row by row: the matrix of the expert whose segment holds the row."""
    rows = []
    for row, value in enumerate(x):
        expert = int((offsets[1:] <= row).sum())
        rows.append(value @ weights[expert] if expert < len(weights) else weights[0, 0] * 0)
    return torch.stack(rows)


def assert_close(op: str, got: Tensor | None, wanted: Tensor | None) -> None:
    assert got is not None
    assert wanted is not None
    tolerance = TOLERANCES[op, got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance.atol, rtol=tolerance.rtol)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_mm(
    kernel: Kernels,
    dtype: torch.dtype,
    case: tuple[tuple[int, ...], int, int, int],
    transposed: bool,
) -> None:
    counts, rest, width, out_width = case
    num_rows, offsets = sum(counts) + rest, offsets_of(counts)
    x = randn(num_rows, width, dtype=dtype, seed=0).requires_grad_()
    shape = (len(counts), width, out_width)
    if transposed:
        stored = randn(shape[0], shape[2], shape[1], dtype=dtype, seed=1)
        weights = stored.transpose(1, 2).detach().requires_grad_()
    else:
        weights = randn(*shape, dtype=dtype, seed=1).requires_grad_()
    out = kernel("grouped_mm")(x, weights, offsets)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weights)]
    wanted = definition(*exact, offsets)
    assert_close("grouped_mm", out, wanted)
    assert torch.equal(out[int(offsets[-1]) :], torch.zeros_like(out[int(offsets[-1]) :]))
    grad = randn(num_rows, out_width, dtype=dtype, seed=2)
    out.backward(grad)
    wanted.backward(grad.double())
    assert_close("grouped_mm", x.grad, exact[0].grad)
    assert_close("grouped_mm", weights.grad, exact[1].grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [(1, 1, 1, 1, 1, None), (21, 5, 2, 33, 40, None), (40, 4, 3, 24, 17, 16)],
    ids=str,
)
def test_gather_grouped_mm(
    kernel: Kernels, dtype: torch.dtype, case: tuple[int, int, int, int, int, int | None]
) -> None:
    num_tokens, num_experts, k, width, out_width, capacity = case
    scores = randn(num_tokens, num_experts, dtype=torch.float32, seed=3)
    indices = scores.topk(k, dim=1).indices.int()
    plan = resolve("moe_plan", "cpu", "reference")(indices, num_experts, 8, capacity)
    x = randn(num_tokens, width, dtype=dtype, seed=0).requires_grad_()
    weights = randn(num_experts, width, out_width, dtype=dtype, seed=1)
    weights = (weights / out_width).to(dtype).requires_grad_()
    out = kernel("gather_grouped_mm")(x, weights, *plan)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weights)]
    filled_R = plan[1] >= 0
    token_R = plan[1].clamp(min=0).long() // k
    rows = exact[0][token_R] * filled_R[:, None]
    wanted = definition(rows, exact[1], plan[0])
    assert_close("gather_grouped_mm", out, wanted)
    grad = randn(*out.shape, dtype=dtype, seed=2)
    out.backward(grad)
    wanted.backward(grad.double())
    assert_close("gather_grouped_mm", x.grad, exact[0].grad)
    assert_close("gather_grouped_mm", weights.grad, exact[1].grad)


@pytest.mark.parametrize("shape", [(0, 4, 5), (6, 0, 5), (6, 4, 0)], ids=str)
def test_empty(kernel: Kernels, shape: tuple[int, int, int]) -> None:
    num_rows, width, out_width = shape
    x = torch.ones(num_rows, width, requires_grad=True)
    weights = torch.ones(2, width, out_width, requires_grad=True)
    offsets = offsets_of((num_rows // 2, num_rows // 2))
    out = kernel("grouped_mm")(x, weights, offsets)
    assert torch.equal(out, torch.zeros(num_rows, out_width))
    out.sum().backward()
    for leaf in (x, weights):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_strided_input(kernel: Kernels) -> None:
    op = kernel("grouped_mm")
    weights = randn(2, 6, 5, dtype=torch.float32, seed=1)
    offsets = offsets_of((4, 3))
    for x in (randn(14, 12, dtype=torch.float32, seed=0)[::2, ::2],
              randn(6, 7, dtype=torch.float32, seed=0).T):  # fmt: skip
        assert not x.is_contiguous()
        assert_close("grouped_mm", op(x, weights, offsets), definition(
            x.double(), weights.double(), offsets))  # fmt: skip
    x = randn(7, 6, dtype=torch.float32, seed=0).requires_grad_()
    op(x, weights, offsets).sum().backward()  # a gradient with strides of 0
    wanted = weights.double().sum(2)[[0] * 4 + [1] * 3]
    assert_close("grouped_mm", x.grad, wanted)


def test_row_past_the_last_segment_does_not_leak(kernel: Kernels) -> None:
    x = torch.ones(5, 3).index_fill(0, torch.tensor([4]), float("nan")).requires_grad_()
    weights = torch.ones(1, 3, 2, requires_grad=True)
    out = kernel("grouped_mm")(x, weights, offsets_of((4,)))
    assert out.tolist() == [[3.0, 3.0]] * 4 + [[0.0, 0.0]]
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[[4.0, 4.0]] * 3]
    assert x.grad is not None
    assert x.grad[4].tolist() == [0.0] * 3


@pytest.mark.parametrize("first", [-3, 0, 1, 5, 9, 100])
def test_zero_tail_writes_the_tail_alone(first: int) -> None:
    """What zeroes the rows after the last segment where the offsets cannot be read."""
    pytest.importorskip("triton")
    from carillon.kernels.moe_routing.triton_grouped import zero_tail

    out = torch.ones(9, 1030)
    zero_tail(out, torch.tensor([0, 3, first], dtype=torch.int32))
    kept = min(max(first, 0), 9)
    assert torch.equal(out[:kept], torch.ones(kept, 1030))
    assert torch.equal(out[kept:], torch.zeros(9 - kept, 1030))

"""Columns in chunks: what the chunks' results add up to is what all columns give at once."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("contrastive")
N, M, D, FIRST = 23, 41, 12, 9  # columns 0 to 8 and 32 to 40 match no row
BOUNDS = [(0, 5), (5, 14), (14, 14), (14, 33), (33, 41)]  # a chunk of none, one inside all matches


class Problem(NamedTuple):
    """Features of the op's dtype, and what the loss weighs its results by."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor
    row_ids: Tensor
    column_ids: Tensor
    by_rows: Tensor
    by_columns: Tensor

    def chunks(self) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
        """Where a chunk stands, its columns, its first_column and its ids."""
        for begin, end in BOUNDS:
            at = slice(begin, end)
            yield at, self.columns[at], FIRST - begin, self.column_ids[at]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def problem(request: pytest.FixtureRequest) -> Problem:
    generator = torch.Generator().manual_seed(3)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, D, generator=generator), dim=-1).to(request.param)

    return Problem(
        *(unit(N), unit(M), torch.tensor([30.0]), torch.tensor([-4.0])),
        *(torch.randint(-1, 6, (count,), generator=generator) for count in (N, M)),
        *(torch.rand(count, generator=generator) for count in (N, M)),
    )


def wide(problem: Problem) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """float64 leaves for the definition, and the weights of its results."""
    leaves = [value.double().requires_grad_() for value in problem[:4]]
    return leaves, (problem.by_rows.double(), problem.by_columns.double())


def assert_same(op: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[op, dtype]
    bound = tolerance.atol + tolerance.rtol * float(wanted.abs().max())
    assert float((got.double() - wanted).abs().max()) <= bound


def test_softmax_chunks_add_up(problem: Problem, kernel: Kernels) -> None:
    (rows, columns, scale, _), (by_rows, by_columns) = wide(problem)
    op, backward = "contrastive", "contrastive_backward"
    ids = problem.row_ids, problem.column_ids
    whole = resolve(op, "cpu", "reference")(rows, columns, scale, FIRST, *ids, True)
    weights = (by_rows, by_columns, by_rows, by_rows, by_columns)
    torch.stack([(o * w).sum() for o, w in zip(whole, weights, strict=True)]).sum().backward()
    dtype = problem.rows.dtype

    parts = [
        kernel(op)(*(problem.rows, chunk, problem.scale, first, problem.row_ids, column_ids, True))
        for _, chunk, first, column_ids in problem.chunks()
    ]
    row_lse = torch.stack([part[0] for part in parts]).logsumexp(0)
    column_lse = torch.cat([part[1] for part in parts])
    positive = torch.stack([part[2] for part in parts])
    row_sum = torch.stack([part[3] for part in parts]).sum(0)
    column_sum = torch.cat([part[4] for part in parts])
    assert positive.count_nonzero(0).tolist() == [1] * N  # each row has one match in one chunk
    results = (row_lse, column_lse, positive.sum(0), row_sum, column_sum)
    for got, wanted in zip(results, whole, strict=True):
        assert_same(op, got, wanted.detach(), dtype)

    by_row_parts, by_scale = torch.zeros(N, D), torch.zeros(1)
    for at, chunk, first, column_ids in problem.chunks():
        shares = kernel(backward)(
            *(problem.rows, chunk, problem.scale, first, problem.row_ids, column_ids),
            *(row_lse, column_lse[at], problem.by_rows, problem.by_columns[at], problem.by_rows),
            *(problem.by_rows, problem.by_columns[at]),
        )
        assert columns.grad is not None
        if len(chunk):
            assert_same(backward, shares[1], columns.grad[at], dtype)
        by_row_parts += shares[0].float()
        by_scale += shares[2]
    assert rows.grad is not None
    assert scale.grad is not None
    assert_same(backward, by_row_parts, rows.grad, dtype)
    assert_same(backward, by_scale, scale.grad, torch.float32)


def test_sigmoid_chunks_add_up(problem: Problem, kernel: Kernels) -> None:
    leaves, (by_rows, _) = wide(problem)
    op, backward = "contrastive_sigmoid", "contrastive_sigmoid_backward"
    ids = problem.row_ids, problem.column_ids
    whole = resolve(op, "cpu", "reference")(*leaves, FIRST, *ids)
    (whole * by_rows).sum().backward()
    dtype = problem.rows.dtype
    losses, single = torch.zeros(N), (problem.scale, problem.bias)
    shares_of: list[list[Tensor]] = []
    for _, chunk, first, column_ids in problem.chunks():
        given = (problem.rows, chunk, *single, first, problem.row_ids, column_ids)
        losses += kernel(op)(*given)
        shares_of.append(kernel(backward)(*given, problem.by_rows))
    assert_same(op, losses, whole.detach(), dtype)
    by_columns = torch.cat([shares[1] for shares in shares_of])
    totals = [torch.stack([s[k].float() for s in shares_of]).sum(0) for k in (0, 2, 3)]
    wanted = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in wanted)
    rows, columns, scale, bias = (g for g in wanted if g is not None)
    assert_same(backward, by_columns, columns, dtype)
    assert_same(backward, totals[0], rows, dtype)
    assert_same(backward, totals[1], scale, torch.float32)
    assert_same(backward, totals[2], bias, torch.float32)


def test_the_definition_chunk_by_chunk() -> None:
    """Guards the reference itself: matches and losses pair by pair."""
    generator = torch.Generator().manual_seed(4)
    rows, columns = torch.randn(4, 3, generator=generator), torch.randn(3, 3, generator=generator)
    one = torch.ones(1)
    for first in range(-5, 5):
        got = resolve("contrastive", "cpu", "reference")(rows, columns, one, first)
        losses = resolve("contrastive_sigmoid", "cpu", "reference")(rows, columns, one, one, first)
        for i in range(4):
            match = first + i
            logits = [float(rows[i] @ columns[j]) for j in range(3)]
            positive = logits[match] if 0 <= match < 3 else 0.0
            assert float(got.positive[i]) == pytest.approx(positive, abs=1e-6)
            signed = [-(x + 1) if j == match else x + 1 for j, x in enumerate(logits)]
            loss = sum(math.log1p(math.exp(x)) for x in signed)
            assert float(losses[i]) == pytest.approx(loss, rel=1e-5)

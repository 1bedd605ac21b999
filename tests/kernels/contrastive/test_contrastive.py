"""The contrastive ops: every provider against the definition in float64, forward and backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.table import load_native, resolve
from carillon.kernels.tolerances import TOLERANCES

DTYPES = [torch.float32, torch.bfloat16]
Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("contrastive")


class Case(NamedTuple):
    """A problem's sizes, and what is asked of it."""

    n: int
    m: int
    d: int
    first_column: int = 0
    scale: float = 14.0
    with_ids: bool = False
    with_sums: bool = False


# One pair; odd sizes that no tile or vector divides; dims of one; hard negatives behind and before;
# exactly one tile; rows of two tiles over columns of three; no row; no column; more rows than
# columns; the last rows, the first or all without a match; columns of a few ids, so that a row
# without a match may be left out whole.
CASES = [
    Case(1, 1, 8),
    Case(7, 7, 5, with_ids=True),
    Case(3, 3, 1, with_sums=True),
    Case(5, 11, 33, first_column=6),
    Case(96, 192, 32, first_column=3, scale=100.0),
    Case(130, 401, 34, first_column=100, with_ids=True, with_sums=True),
    Case(0, 5, 8),
    Case(4, 4, 8, scale=0.0),
    Case(5, 0, 8, with_sums=True),
    Case(9, 4, 33, first_column=-3),
    Case(5, 7, 6, first_column=4, with_ids=True),
    Case(260, 207, 20, first_column=-101, with_ids=True, with_sums=True),
    Case(3, 4, 8, first_column=2**63 - 1),
    Case(3, 4, 8, first_column=-(2**63), with_sums=True),
    Case(40, 2, 8, first_column=-39, with_ids=True),
]
# On a GPU several tiles of both sides too, of a size that takes more than one round of blocks.
LARGE = [
    Case(300, 700, 72, first_column=-30, with_ids=True, with_sums=True),
    Case(2100, 4500, 768, first_column=5),
]
CASES_OF_PROVIDERS = [
    pytest.param(case, marks=[pytest.mark.not_interpreted] * (case.n * case.m >= 20_000))
    for case in [
        *CASES,
        Case(67, 70, 40, with_ids=True),
        *(LARGE if torch.cuda.is_available() else []),
    ]
]


class Inputs(NamedTuple):
    """Float64 values that the dtype holds exactly, so that only arithmetic differs."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor
    ids: tuple[Tensor, Tensor] | tuple[None, None]
    weights: list[Tensor]


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(case.n * 1000 + case.m)

    def unit(count: int) -> Tensor:
        values = torch.randn(count, case.d, dtype=torch.float64, generator=generator)
        return F.normalize(values, dim=-1).to(dtype).double()

    def ids(count: int) -> Tensor:
        return torch.randint(-1, max(min(case.n, case.m) // 2, 2), (count,), generator=generator)

    lengths = (case.n, case.m, case.n, case.n, case.m)
    return Inputs(
        rows=unit(case.n),
        columns=unit(case.m),
        scale=torch.tensor([case.scale], dtype=torch.float64),
        bias=torch.tensor([-3.0], dtype=torch.float64),
        ids=(ids(case.n), ids(case.m)) if case.with_ids else (None, None),
        weights=[torch.rand(k, dtype=torch.float64, generator=generator) for k in lengths],
    )


def leaves(*values: Tensor) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values]


def softmax(
    op: Callable[..., Any], case: Case, given: Inputs, dtype: torch.dtype, single: torch.dtype
) -> list[Tensor]:
    """Outputs, then gradients of their weighted sum by rows, columns and scale."""
    rows, columns, scale = leaves(
        given.rows.to(dtype), given.columns.to(dtype), given.scale.to(single)
    )
    outputs = op(rows, columns, scale, case.first_column, *given.ids, case.with_sums)
    finite = [torch.where(out.isfinite(), out.double(), 0.0) for out in outputs]
    weighted = [(o * w).sum() for o, w in zip(finite, given.weights, strict=True) if o.numel()]
    torch.stack(weighted).sum().backward()
    return [*(o.detach() for o in outputs), *(x.grad for x in (rows, columns, scale))]  # type: ignore[misc]


def sigmoid(
    op: Callable[..., Any], case: Case, given: Inputs, dtype: torch.dtype, single: torch.dtype
) -> list[Tensor]:
    """Losses, then gradients of their weighted sum by rows, columns, scale and bias."""
    given_leaves = (given.rows.to(dtype), given.columns.to(dtype))
    parts = leaves(*given_leaves, given.scale.to(single), given.bias.to(single))
    losses = op(*parts, case.first_column, *given.ids)
    (losses.double() * given.weights[0]).sum().backward()
    return [losses.detach(), *(x.grad for x in parts)]  # type: ignore[misc]


NAMES = {
    "contrastive": ("row_lse", "column_lse", "positive", "row_sum", "column_sum"),
    "contrastive_sigmoid": ("losses",),
}
GRADIENTS = ("rows", "columns", "scale", "bias")


def assert_close(op: str, got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[op, dtype]
    names = [*NAMES[op], *GRADIENTS]
    for name, a, b in zip(names, (value.cpu() for value in got), wanted, strict=False):
        assert a.shape == b.shape, name
        assert torch.equal(a.isfinite(), b.isfinite()), name
        finite = b.isfinite()
        if not finite.any():
            continue
        # Sums of hundreds of terms of both signs: the bound is relative to the largest value.
        bound = tolerance.atol + tolerance.rtol * float(b[finite].abs().max())
        worst = float((a.double() - b)[finite].abs().max())
        assert worst <= bound, f"{name}: {worst:.2e} is more than {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES_OF_PROVIDERS, ids=str)
def test_softmax_matches_definition(kernel: Kernels, case: Case, dtype: torch.dtype) -> None:
    given = inputs_of(case, dtype)
    reference = resolve("contrastive", "cpu", "reference")
    wanted = softmax(reference, case, given, torch.float64, torch.float64)
    got = softmax(kernel("contrastive"), case, given, dtype, torch.float32)
    assert [g.dtype for g in got[5:7]] == [dtype, dtype]
    assert_close("contrastive", got, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES_OF_PROVIDERS, ids=str)
def test_sigmoid_matches_definition(kernel: Kernels, case: Case, dtype: torch.dtype) -> None:
    given = inputs_of(case, dtype)
    reference = resolve("contrastive_sigmoid", "cpu", "reference")
    wanted = sigmoid(reference, case, given, torch.float64, torch.float64)
    op = kernel("contrastive_sigmoid")
    got = sigmoid(op, case, given, dtype, torch.float32)
    assert_close("contrastive_sigmoid", got, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES[3:6], CASES[11]], ids=str)
def test_every_instruction_set_matches_definition(
    instruction_set: str, case: Case, dtype: torch.dtype
) -> None:
    given = inputs_of(case, dtype)
    for op, run in (("contrastive", softmax), ("contrastive_sigmoid", sigmoid)):
        reference = resolve(op, "cpu", "reference")
        wanted = run(reference, case, given, torch.float64, torch.float64)
        got = run(resolve(op, "cpu", "native"), case, given, dtype, torch.float32)
        assert_close(op, got, wanted, dtype)


def test_an_unknown_instruction_set_is_named() -> None:
    load_native()
    with pytest.raises(ValueError, match="avx512_bf16 is allowed, got avx1024"):
        torch.ops.carillon.limit_instruction_set("avx1024")


def test_reference_is_the_clip_loss() -> None:
    """Guards the definition itself: cross-entropy in both directions, label smoothing included."""
    given = inputs_of(Case(9, 9, 16), torch.float32)
    rows, columns, scale = leaves(given.rows, given.columns, given.scale)
    row_lse, column_lse, positive, row_sum, column_sum = resolve("contrastive", "cpu", "reference")(
        rows, columns, scale, 0, None, None, True
    )
    logits, labels = scale * rows @ columns.T, torch.arange(9)
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    torch.testing.assert_close((row_lse + column_lse - 2 * positive).mean(), expected)
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
    ours = (row_lse - 0.9 * positive - 0.1 * row_sum / 9).mean()
    torch.testing.assert_close(ours, smooth)
    smooth = F.cross_entropy(logits.T, labels, label_smoothing=0.1)
    ours = (column_lse - 0.9 * positive - 0.1 * column_sum / 9).mean()
    torch.testing.assert_close(ours, smooth)


def test_reference_leaves_out_false_negatives() -> None:
    rows = torch.eye(3)
    ids = torch.tensor([5, 5, -1])
    row_lse, column_lse, *_ = resolve("contrastive", "cpu", "reference")(
        rows, rows, torch.ones(1), 0, ids, torch.tensor([5, 5, -1])
    )
    both, pair = torch.tensor([1.0, 0.0, 0.0]).logsumexp(0), torch.tensor([1.0, 0.0]).logsumexp(0)
    torch.testing.assert_close(row_lse, torch.stack([pair, pair, both]))
    torch.testing.assert_close(column_lse, torch.stack([pair, pair, both]))


def test_a_shared_shift_that_underflows(kernel: Kernels) -> None:
    """One row far below the other: e^-150 of the tile's largest is zero in float32, yet its sum has
    nothing else."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    columns = torch.tensor([[60.0, -90.0], [50.0, -80.0]])
    given = Inputs(rows, columns, torch.ones(1), torch.ones(1), (None, None), [torch.ones(2)] * 5)
    case = Case(2, 2, 2)
    reference = resolve("contrastive", "cpu", "reference")
    wide = given._replace(**{k: getattr(given, k).double() for k in ("rows", "columns", "scale")})
    wanted = softmax(reference, case, wide, torch.float64, torch.float64)
    got = softmax(kernel("contrastive"), case, given, torch.float32, torch.float32)
    assert_close("contrastive", got, wanted, torch.float32)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_column_that_is_left_out_whole(kernel: Kernels, weight: float) -> None:
    """Its log-sum-exp is -inf, and it gets no gradient from it, whatever the loss makes of it."""
    rows, columns, scale = leaves(torch.eye(2), torch.ones(3, 2), torch.ones(1))
    op = kernel("contrastive")
    out = op(rows, columns, scale, 0, torch.tensor([7, 7]), torch.tensor([1, 2, 7]))
    assert out[1].isfinite().tolist() == [True, True, False]
    (out[1] * torch.tensor([1.0, 1.0, weight])).sum().backward()
    assert columns.grad is not None
    assert columns.grad[2].tolist() == [0.0, 0.0]
    assert columns.grad[0].abs().sum() > 0


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_row_that_is_left_out_whole(kernel: Kernels, weight: float) -> None:
    """So does a row whose match is not among the columns."""
    rows, columns, scale = leaves(torch.ones(3, 2), torch.eye(2), torch.ones(1))
    op = kernel("contrastive")
    out = op(rows, columns, scale, -1, torch.tensor([9, 9, 9]), torch.tensor([9, 9]))
    assert out[0].isfinite().tolist() == [False, True, True]
    assert out[2].tolist() == [0.0, 1.0, 1.0]
    (out[0] * torch.tensor([weight, 1.0, 1.0])).sum().backward()
    assert rows.grad is not None
    assert rows.grad[0].tolist() == [0.0, 0.0]
    assert rows.grad[1:].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_strided_input(kernel: Kernels) -> None:
    whole = F.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    op = kernel("contrastive")
    rows, columns = whole[::2, ::2], whole.T[:8].T
    wanted = op(rows.contiguous(), columns.contiguous(), torch.ones(1))
    for a, b in zip(op(rows, columns, torch.ones(1)), wanted, strict=True):
        assert torch.equal(a, b)


PAIR = torch.zeros(4, 8), torch.zeros(6, 8), torch.ones(1)
BAD = [
    ((PAIR[0][0], PAIR[1], PAIR[2]), r"shapes \(N, D\) and \(M, D\)"),
    ((PAIR[0], PAIR[1][:, :4], PAIR[2]), r"shapes \(N, D\) and \(M, D\)"),
    ((PAIR[0].half(), PAIR[1].half(), PAIR[2]), "both be float32 or both bfloat16"),
    ((PAIR[0], PAIR[1].bfloat16(), PAIR[2]), "both be float32 or both bfloat16"),
    ((PAIR[0], PAIR[1], torch.ones(2)), "scale must be one float32 value"),
    ((*PAIR, 0, torch.zeros(4, dtype=torch.int64)), "row_ids and column_ids, or neither"),
    (
        (*PAIR, 0, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
        r"column_ids must be int64 of shape \(6,\)",
    ),
    ((*PAIR, 0, torch.zeros(4), torch.zeros(6)), "row_ids must be int64"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_name_what_is_allowed(
    kernel: Kernels, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel("contrastive")(*arguments)


def test_bad_bias(kernel: Kernels) -> None:
    with pytest.raises(ValueError, match="bias must be one float32 value"):
        kernel("contrastive_sigmoid")(*PAIR, torch.ones(3))


VECTORS = ("row_lse", "column_lse", "row_lse_grad", "column_lse_grad", "positive_grad")
SUMS = ("row_sum_grad", "column_sum_grad")


@pytest.mark.parametrize("name", [*VECTORS, *SUMS])
def test_backward_refuses_vectors_of_another_length(kernel: Kernels, name: str) -> None:
    backward = kernel("contrastive_backward")
    vectors = {key: torch.zeros(6 if "column" in key else 4) for key in (*VECTORS, *SUMS)}
    vectors[name] = torch.zeros(5)
    with pytest.raises(ValueError, match=rf"backward: {name} must be float32 of shape"):
        backward(*PAIR, 0, None, None, *vectors.values())


def test_backward_refuses_half_of_what_belongs_together(kernel: Kernels) -> None:
    backward = kernel("contrastive_backward")
    vectors = [torch.zeros(6 if "column" in key else 4) for key in VECTORS]
    with pytest.raises(ValueError, match="give row_sum_grad and column_sum_grad, or neither"):
        backward(*PAIR, 0, None, None, *vectors, torch.zeros(4), None)
    backward = kernel("contrastive_sigmoid_backward")
    with pytest.raises(ValueError, match=r"row_loss_grad must be float32 of shape \(4,\)"):
        backward(*PAIR, torch.zeros(1), 0, None, None, torch.zeros(6))


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_nan_features_reach_the_loss(provider: str) -> None:
    """Not an error here: a trainer's guard judges the loss, and names the batch."""
    rows = torch.full((3, 4), 0.5)
    rows[1, 2] = float("nan")
    out = resolve("contrastive", "cpu", provider)(rows, torch.ones(3, 4), torch.ones(1))
    assert out[0].isnan().tolist() == [False, True, False]
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("first_column", [1, -2])
def test_opcheck(dtype: torch.dtype, with_ids: bool, first_column: int) -> None:
    load_native()
    given = inputs_of(Case(5, 7, 6, with_ids=with_ids), dtype)
    features = leaves(given.rows.to(dtype), given.columns.to(dtype))
    single, rest = leaves(given.scale.float(), given.bias.float()), (first_column, *given.ids)
    ops = torch.ops.carillon
    torch.library.opcheck(ops.contrastive.default, (*features, single[0], *rest, True))
    torch.library.opcheck(ops.contrastive_sigmoid.default, (*features, *single, *rest))
    # The backward ops have no gradient themselves.
    features, single = ([x.detach() for x in values] for values in (features, single))
    vectors = [torch.ones(7 if "column" in name else 5) for name in (*VECTORS, *SUMS)]
    arguments = (*features, single[0], *rest, *vectors)
    torch.library.opcheck(ops.contrastive_backward.default, arguments)
    arguments = (*features, *single, *rest, torch.ones(5))
    torch.library.opcheck(ops.contrastive_sigmoid_backward.default, arguments)


def test_compiles_without_a_break() -> None:
    load_native()
    given = inputs_of(Case(6, 6, 8), torch.float32)

    def loss(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        out = torch.ops.carillon.contrastive(rows, columns, scale)
        return (out[0] + out[1] - 2 * out[2]).mean()

    parts = leaves(given.rows.float(), given.columns.float(), given.scale.float())
    again = leaves(*parts)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*parts).backward()
    loss(*again).backward()
    for a, b in zip(parts, again, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_repeats_to_the_bit_and_threads_agree_closely() -> None:
    case = Case(200, 300, 24, first_column=7, scale=50.0)
    given = inputs_of(case, torch.bfloat16)
    op = resolve("contrastive", "cpu", "native")
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            runs.append(softmax(op, case, given, torch.bfloat16, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for a, b in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)

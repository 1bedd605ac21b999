"""moe_topk: each provider against the definition in float64, values and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("moe_topk")
EPSILON = 1e-20


class Rule(NamedTuple):
    """The settings of one way to route."""

    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    biased: bool = False


RULES = [Rule(), Rule(renormalize=False), Rule("sigmoid", scale=2.5, biased=True), Rule("sigmoid")]
# One expert; all chosen; widths beside a vector's; more tokens than a chunk of 256, more experts
# than a vector and k at its limit.
SHAPES = [(1, 1, 1), (3, 5, 5), (37, 17, 3), (40, 64, 8), (13, 100, 16)]


def logits_of(num_tokens: int, num_experts: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    return (scale * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype)


def bias_of(num_experts: int) -> Tensor:
    return torch.linspace(-0.3, 0.3, num_experts)


def definition(logits_TE: Tensor, indices_TK: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the given experts, mean scores and z loss, of float64 logits."""
    exps_TE = (logits_TE - logits_TE.amax(1, keepdim=True).detach()).exp()
    scores_TE = exps_TE / exps_TE.sum(1, keepdim=True)
    if rule.score == "sigmoid":
        scores_TE = 1 / (1 + (-logits_TE).exp())
    weights_TK = torch.stack(
        [scores_TE[range(len(scores_TE)), index_T] for index_T in indices_TK.long().T], dim=1
    )
    if rule.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + EPSILON)
    shares_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + EPSILON)
    return weights_TK * rule.scale, shares_TE.mean(0), logits_TE.logsumexp(1).square().mean()


def chosen(logits_TE: Tensor, k: int, bias_E: Tensor | None) -> list[list[int]]:
    """Best first, ties to the lower index; by the score plus bias, or by the logit."""
    by_TE = logits_TE if bias_E is None else logits_TE.double().sigmoid() + bias_E.double()
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in by_TE.tolist()]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCES["moe_topk", got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance.atol, rtol=tolerance.rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(
    kernel: Kernels, dtype: torch.dtype, rule: Rule, shape: tuple[int, int, int]
) -> None:
    num_tokens, num_experts, k = shape
    logits = logits_of(num_tokens, num_experts, dtype).requires_grad_()
    bias = bias_of(num_experts) if rule.biased else None
    op = kernel("moe_topk")
    weights, indices, counts, means, z = op(
        logits, k, rule.score, rule.renormalize, rule.scale, bias
    )
    assert indices.tolist() == chosen(logits, k, bias)
    assert indices.dtype == counts.dtype == torch.int32
    assert counts.tolist() == torch.bincount(indices.flatten(), minlength=num_experts).tolist()
    exact = logits.detach().double().requires_grad_()
    wanted = definition(exact, indices, rule)
    for got, want in zip((weights, means, z), wanted, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want)

    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(w.shape, generator=generator) for w in wanted]
    torch.autograd.backward([weights, means, z], grads)
    torch.autograd.backward(wanted, [g.double() for g in grads])
    assert logits.grad is not None
    assert exact.grad is not None
    assert_close(logits.grad, exact.grad)


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_many_tokens_cross_chunks(provider: str) -> None:
    logits = logits_of(1000, 9, torch.float32)
    weights, indices, counts, means, z = resolve("moe_topk", "cpu", provider)(logits, 2)
    wanted = definition(logits.double(), indices, Rule())
    assert indices.tolist() == chosen(logits, 2, None)
    assert int(counts.sum()) == 2000
    for got, want in zip((weights, means, z), wanted, strict=True):
        assert_close(got, want)


def test_ties_go_to_the_lower_expert(kernel: Kernels) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, -0.0, 0.0, -0.0, -0.0], [-1.0] * 5])
    op = kernel("moe_topk")
    _, indices, *_ = op(logits, 3)
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 2]]
    _, indices, *_ = op(logits, 5, "sigmoid", True, 1.0, torch.zeros(5))
    assert indices.tolist() == [[1, 2, 3, 0, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_bias_moves_the_choice_and_not_the_weights(kernel: Kernels) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 5.0])
    op = kernel("moe_topk")
    weights, indices, *_ = op(logits, 2, "sigmoid", False, 1.0, bias)
    assert indices.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, logits.detach()[:, [2, 0]].sigmoid())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 60.0, 1e30])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
def test_extreme_logits_stay_finite(kernel: Kernels, rule: Rule, scale: float) -> None:
    """Scores of exactly 0 and 1, and squares that overflow nowhere but in the z loss."""
    logits = logits_of(6, 12, torch.float32, scale).requires_grad_()
    bias = bias_of(12) if rule.biased else None
    op = kernel("moe_topk")
    weights, indices, _, means, _ = op(logits, 3, rule.score, rule.renormalize, rule.scale, bias)
    wanted = definition(logits.detach().double(), indices, rule)
    assert_close(weights, wanted[0])
    assert_close(means, wanted[1])
    (weights.square().sum() + means.square().sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_no_tokens(kernel: Kernels) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    weights, indices, counts, means, z = kernel("moe_topk")(logits, 2)
    assert weights.shape == indices.shape == (0, 2)
    assert counts.tolist() == [0] * 4
    assert means.tolist() == [0.0] * 4
    assert z.item() == 0
    (weights.sum() + means.sum() + z).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 4)


def test_strided_logits(kernel: Kernels) -> None:
    whole = logits_of(22, 30, torch.float32)
    op = kernel("moe_topk")
    for logits in (whole[::2, 3::3], whole.T, whole[:1].expand(5, -1)):
        assert not logits.is_contiguous()
        for got, want in zip(op(logits, 2), op(logits.contiguous(), 2), strict=True):
            assert torch.equal(got, want)


def test_one_and_two_threads_agree_to_the_bit() -> None:
    logits = logits_of(1500, 20, torch.float32).requires_grad_()
    op = resolve("moe_topk", "cpu", "native")
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            logits.grad = None
            weights, indices, counts, means, z = op(logits, 4, "sigmoid")
            (weights.square().sum() + means.square().sum() + z).backward()
            results.append((weights, indices, counts, means, z, logits.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

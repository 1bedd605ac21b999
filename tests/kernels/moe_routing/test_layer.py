"""The ops composed to a layer, against a dense loop over the experts in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("moe_topk")
LEAVES = ("x", "logits", "up", "down")


def dense_layer(leaves: dict[str, Tensor], k: int, score: str) -> tuple[Tensor, Tensor]:
    """Every expert sees every token and is weighed, by zero where it is not chosen."""
    x_TD, logits_TE = leaves["x"], leaves["logits"]
    num_tokens, num_experts = logits_TE.shape
    scores_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    kept_TE = torch.zeros_like(logits_TE)
    for token, row in enumerate(logits_TE.tolist()):
        for expert in sorted(range(num_experts), key=lambda e: (-row[e], e))[:k]:
            kept_TE[token, expert] = 1
    gates_TE = scores_TE * kept_TE
    gates_TE = gates_TE / gates_TE.sum(1, keepdim=True)
    out_TD = torch.zeros_like(x_TD)
    for expert in range(num_experts):
        hidden_TF = torch.nn.functional.silu(x_TD @ leaves["up"][expert])
        out_TD = out_TD + gates_TE[:, expert, None] * (hidden_TF @ leaves["down"][expert])
    shares_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    balance = num_experts * (kept_TE.sum(0) / (num_tokens * k) * shares_TE.mean(0)).sum()
    return out_TD, balance + logits_TE.logsumexp(1).square().mean()


def composed_layer(
    leaves: dict[str, Tensor], k: int, score: str, kernel: Kernels, gather: bool
) -> tuple[Tensor, Tensor]:
    topk, plan, permute, unpermute, multiply, gather_multiply = (
        kernel(name)
        for name in (
            "moe_topk",
            "moe_plan",
            "moe_permute",
            "moe_unpermute",
            "grouped_mm",
            "gather_grouped_mm",
        )
    )
    weights, indices, counts, means, z = topk(leaves["logits"], k, score)
    offsets, *maps = plan(indices, len(leaves["up"]))
    if gather:
        hidden = gather_multiply(leaves["x"], leaves["up"], offsets, *maps)
    else:
        hidden = multiply(permute(leaves["x"], *maps), leaves["up"], offsets)
    rows = multiply(torch.nn.functional.silu(hidden), leaves["down"], offsets)
    return unpermute(rows, weights, *maps), load_balancing_loss(means, counts) + z


@pytest.mark.parametrize("gather", [False, True], ids=["permuted", "gathered"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(23, 6, 2), (9, 4, 4), (1, 3, 1)], ids=str)
def test_layer_matches_dense_loop(
    kernel: Kernels, shape: tuple[int, int, int], score: str, gather: bool
) -> None:
    """Same output and losses; per tensor the same gradient, to 1e-5 of its norm."""
    num_tokens, num_experts, k = shape
    width, hidden = 20, 28
    generator = torch.Generator().manual_seed(5)
    shapes = dict(
        zip(
            LEAVES,
            (
                (num_tokens, width),
                (num_tokens, num_experts),
                (num_experts, width, hidden),
                (num_experts, hidden, width),
            ),
            strict=True,
        )
    )
    leaves = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    exact = {n: leaf.detach().double().requires_grad_() for n, leaf in leaves.items()}
    got = composed_layer(leaves, k, score, kernel, gather)
    wanted = dense_layer(exact, k, score)
    for ours, theirs in zip(got, wanted, strict=True):
        error = (ours.detach().double() - theirs.detach()).norm()
        assert float(error) <= 1e-6 * float(theirs.detach().norm())
    grad = torch.randn(num_tokens, width, generator=generator)
    torch.autograd.backward(got, [grad, torch.tensor(1.0)])
    torch.autograd.backward(wanted, [grad.double(), torch.tensor(1.0).double()])
    norm = float(torch.cat([leaf.grad.flatten() for leaf in exact.values()]).norm())
    for name, leaf in leaves.items():
        error = float((leaf.grad.double() - exact[name].grad).norm())
        assert error <= 1e-5 * max(float(exact[name].grad.norm()), 1e-3 * norm), name

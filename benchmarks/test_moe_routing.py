"""Routing and permutation against peers (peers/moe_routing.py), both passes.

All sides give the weighted sum of permuted rows, the balancing and z losses, and in the backward
pass the gradients of x and logits. No expert is computed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import moe_routing as peers
from race import DTYPES, OURS, Side, race
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss
from carillon.kernels.moe_routing.reference import cost
from carillon.kernels.table import resolve

# A bfloat16 sum of k products, each rounded to it (2^-9), against one rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}


def fused(x_TD: Tensor, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    topk, plan, permute, unpermute = (
        resolve(name, "cpu") for name in ("moe_topk", "moe_plan", "moe_permute", "moe_unpermute")
    )
    weights_TK, indices_TK, counts_E, means_E, z = topk(logits_TE, k)
    _, *maps = plan(indices_TK, logits_TE.shape[1])
    out_TD = unpermute(permute(x_TD, *maps), weights_TK, *maps)
    return out_TD, load_balancing_loss(means_E, counts_E) + z


def step(
    side: peers.Routing, x_TD: Tensor, logits_TE: Tensor, grad_TD: Tensor, k: int, backward: bool
) -> Side:
    if not backward:
        return torch.no_grad()(lambda: side(x_TD, logits_TE, k))

    def call() -> list[Tensor]:
        out_TD, losses = side(x_TD, logits_TE, k)
        grads = torch.autograd.grad([out_TD, losses], [x_TD, logits_TE], [grad_TD, torch.ones(())])
        return [out_TD.detach(), losses.detach(), *grads]

    return call


SWEEP = {
    (64, 8, 512): (1024, 4096, 16384),
    (8, 2, 512): (1024, 4096, 16384),
    (64, 8, 1024): (4096,),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "width", "backward"),
    [
        *((size, *sizes, True) for sizes, sweep in SWEEP.items() for size in sweep),
        *((sweep[-1], *sizes, False) for sizes, sweep in SWEEP.items()),
    ],
    ids=str,
)
def test_moe_routing(
    benchmark: Any,
    num_tokens: int,
    num_experts: int,
    k: int,
    width: int,
    backward: bool,
    dtype: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD, grad_TD = (
        torch.randn(num_tokens, width, generator=generator).to(DTYPES[dtype]) for _ in range(2)
    )
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator).to(DTYPES[dtype])
    given = (x_TD.requires_grad_(), logits_TE.requires_grad_(), grad_TD, k, backward)
    sides = {OURS: fused} | peers.available("cpu")
    sizes = (num_tokens, num_experts, k, width, DTYPES[dtype].itemsize)
    race(
        benchmark,
        {name: step(side, *given) for name, side in sides.items()},
        op="moe_routing",
        case=f"{k} of {num_experts} experts, width {width}, {dtype}",
        size=num_tokens,
        unit="tokens",
        work=[cost(*sizes, backward=backward)],
        left_out=peers.missing("cpu"),
        tolerance=TOLERANCE[dtype],
        backward=backward,
    )

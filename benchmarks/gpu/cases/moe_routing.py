"""Routing and permutation: topk, plan, permute, unpermute and their gradients, without experts.

Legend: T tokens, E experts, K choices of a token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.moe_routing import reference
from carillon.kernels.moe_routing.balance import load_balancing_loss
from carillon.kernels.moe_routing.reference import cost
from carillon.kernels.table import Kernel

OP = "moe_routing"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Sums of K rows, rounded to bfloat16 once or twice; gradients of logits cancel.
LIMITS = {"bf16": 2.0**-6, "fp32": 1e-5}
BAR = Bar("ratio", 1.0)


class Given(NamedTuple):
    leaves: list[Tensor]
    grads: list[Tensor]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [_case(group, 24, 6, 2, 16, "fp32") for group in ("check", "bar")]
    checks = [_case("check", 1000, e, k, 136, dtype) for e, k in EXPERTS for dtype in DTYPES]
    bars = [_case("bar", 32_768, 64, 8, 2048, "bf16")]
    sweep = [_case("sweep", 16_384, e, k, 2048, "bf16") for e, k in EXPERTS]
    sweep += [_case("sweep", 4096, 64, 8, 1024, "bf16"), _case("sweep", 16_384, 64, 8, 512, "fp32")]
    return [*checks, *bars, *sweep]


EXPERTS = ((8, 2), (64, 8), (256, 8))


def _case(group: str, tokens: int, experts: int, k: int, width: int, dtype: str) -> Case:
    return Case(
        name=f"T={tokens} E={experts} k={k} D={width} {dtype}",
        group=group,
        values={
            "tokens": tokens,
            "experts": experts,
            "k": k,
            "width": width,
            "dtype": dtype,
            "passes": "forward and backward",
        },
        costs=(cost(tokens, experts, k, width, DTYPES[dtype].itemsize),),
        bars=(BAR,) if group == "bar" else (),
        limit=LIMITS[dtype],
    )


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    values, dtype = case.values, DTYPES[case.values["dtype"]]

    def normal(width: int) -> Tensor:
        shape = (values["tokens"], width)
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    leaves = [normal(values["width"]).requires_grad_(), normal(values["experts"]).requires_grad_()]
    return Given(leaves, [normal(values["width"]), torch.ones((), device=device)])


def _route(
    kernel: Callable[[str], Kernel], k: int, *, unlike: bool = False
) -> Callable[[Tensor, Tensor], Any]:
    """`unlike` gives each row a factor of its own, as experts would: without it a token's rows are
    alike, and the gradient of its logits by them is what rounding leaves of zero.
    """
    topk, plan, permute, unpermute = (
        kernel(f"moe_{name}") for name in ("topk", "plan", "permute", "unpermute")
    )

    def route(x_TD: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, indices_TK, counts_E, means_E, z = topk(logits_TE, k)
        _, *maps = plan(indices_TK, logits_TE.shape[1])
        rows_RD = permute(x_TD, *maps)
        if unlike:
            factors_R = torch.linspace(1, 2, len(rows_RD), device=rows_RD.device)
            rows_RD = (rows_RD * factors_R[:, None]).to(rows_RD.dtype)
        out_TD = unpermute(rows_RD, weights_TK, *maps)
        return out_TD, load_balancing_loss(means_E, counts_E) + z

    return route


def _step(route: Callable[[Tensor, Tensor], Any], given: Given) -> Call:
    def call() -> Outputs:
        outputs = route(*given.leaves)
        return (
            *(x.detach() for x in outputs),
            *torch.autograd.grad(outputs, given.leaves, given.grads),
        )

    return call


def sides(case: Case, device: str) -> list[Side]:
    k = case.values["k"]
    ours = of_providers(
        "moe_topk",
        device,
        lambda kernel: lambda given: _step(_route(kernel, k, unlike=case.group == "check"), given),
    )
    if case.group == "check":
        return [side for side in ours if side.kind == "ours"]

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return peers.available(device), peers.missing(device)

    def make(peer: Any) -> Any:
        return lambda given: _step(lambda x, logits: peer(x, logits, k), given)

    return [*ours, *of_peers(OP, find, make)]


def expected(case: Case, given: Given) -> Outputs:
    """By the definition in float32, of the same values: it chooses the same experts."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in given.leaves]
    wide = Given(leaves, [grad.float() for grad in given.grads])
    route = _route(lambda op: getattr(reference, op), case.values["k"], unlike=True)
    return _step(route, wide)()

"""grouped_mm, the experts' products of rows in segments, and with the gather, and gradients.

Legend: R rows, E experts, D input and F output width, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.moe_routing import reference
from carillon.kernels.roofline import Cost
from carillon.kernels.table import resolve

OP = "grouped_mm"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"bf16": 2.0**-6, "fp32": 1e-5}
ALIGNMENT = 16
BAR = Bar("ratio", 1.0)


class Given(NamedTuple):
    leaves: list[Tensor]
    grad: Tensor
    plan: list[Tensor]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [_case(group, op, 24, 4, 2, 16, 32, "fp32") for group in GROUPS for op in OPS]
    checks = [_case("check", op, 300, 8, 2, 256, 384, dtype) for op in OPS for dtype in DTYPES]
    bars = [_case("bar", "grouped_mm", 8192, 64, 8, 2048, 1408, "bf16")]
    sweep = [_case("sweep", "gather_grouped_mm", 8192, 64, 8, 2048, 1408, "bf16")]
    sweep += [_case("sweep", "grouped_mm", 8192, 8, 2, 4096, 4096, "bf16")]
    return [*checks, *bars, *sweep]


OPS = ("grouped_mm", "gather_grouped_mm")
GROUPS = ("check", "bar")


def _case(
    group: str, op: str, tokens: int, experts: int, k: int, d: int, f: int, dtype: str
) -> Case:
    rows, size = tokens * k, DTYPES[dtype].itemsize
    moved = 2 * (rows * (d + f) + experts * d * f) * size
    return Case(
        name=f"{op} T={tokens} E={experts} k={k} D={d} F={f} {dtype}",
        group=group,
        values={
            "op": op,
            "tokens": tokens,
            "experts": experts,
            "k": k,
            "d": d,
            "f": f,
            "dtype": dtype,
            "passes": "forward and backward",
        },
        costs=(Cost(flops=6.0 * rows * d * f, size_bytes=float(moved)),),
        bars=(BAR,) if group == "bar" and op == "grouped_mm" else (),
        limit=LIMITS[dtype],
    )


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    values, dtype = case.values, DTYPES[case.values["dtype"]]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)

    scores = torch.rand(values["tokens"], values["experts"], device=device, generator=generator)
    indices = scores.topk(values["k"], dim=1).indices.int()
    plan = resolve("moe_plan", device, "reference")(indices, values["experts"], ALIGNMENT)
    num_rows = values["tokens"] if values["op"] == "gather_grouped_mm" else len(plan[1])
    d, f = values["d"], values["f"]
    leaves = [normal(num_rows, d), normal(values["experts"], d, f, scale=d**-0.5)]
    grad = normal(len(plan[1]), f)
    return Given([leaf.requires_grad_() for leaf in leaves], grad, list(plan))


def _step(multiply: Any, given: Given) -> Call:
    def call() -> Outputs:
        out = multiply(*given.leaves)
        return (out.detach(), *torch.autograd.grad(out, given.leaves, given.grad))

    return call


def _of(op: Any, case: Case, given: Given) -> Call:
    rest = given.plan if case.values["op"] == "gather_grouped_mm" else given.plan[:1]
    return _step(lambda x, weights: op(x, weights, *rest), given)


def sides(case: Case, device: str) -> list[Side]:
    op = case.values["op"]
    ours = of_providers(op, device, lambda kernel: lambda given: _of(kernel(op), case, given))
    if case.group == "check":
        return [side for side in ours if side.kind == "ours"]
    if op != OP:
        return ours
    dtype = DTYPES[case.values["dtype"]]

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return peers.available(device, dtype), peers.missing(device, dtype)

    return [*ours, *of_peers(OP, find, lambda peer: lambda given: _of(peer, case, given))]


def expected(case: Case, given: Given) -> Outputs:
    """By the definition in float32, of the same values."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in given.leaves]
    wide = Given(leaves, given.grad.float(), given.plan)
    return _of(getattr(reference, case.values["op"]), case, wide)()

"""The contrastive losses, forward and backward, up to a million pairs on one GPU.

Legend: N pairs, D dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.contrastive.reference import contrastive, contrastive_sigmoid, cost
from carillon.kernels.table import Kernel

OP = "contrastive"
SCALE, BIAS = 20.0, -10.0
# Norms: a loss in float32 of exact bfloat16 products; gradients are rounded to 2^-9 twice.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
BARS = {
    32_768: (Bar("ms", 12.0), Bar("ratio", 5.0, "inf_cl"), Bar("ratio", 2.0, "open_clip")),
    1 << 20: (Bar("MiB", 80_000),),  # one GPU
}


class Given(NamedTuple):
    leaves: list[Tensor]


def cases(tiny: bool) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if tiny:
        sizes = [("check", "softmax", 40, 16, fp32), ("check", "sigmoid", 40, 16, fp32)]
        sizes += [("bar", "softmax", 64, 16, fp32), ("long", "softmax", 96, 8, fp32)]
        return [_case(*size) for size in sizes]
    checks = [("check", form, 1000, 768, dtype) for form in FORMS for dtype in (bf16, fp32)]
    checks += [("check", "softmax", 4096 + 37, 96, bf16)]
    bars = [("bar", "softmax", 32_768, 768, bf16)]
    sweep = [("sweep", "sigmoid", 32_768, 768, bf16)]
    sweep += [("sweep", "softmax", n, 768, bf16) for n in (4096, 8192, 16_384, 65_536)]
    sweep += [("sweep", "softmax", 32_768, 512, bf16), ("sweep", "softmax", 32_768, 1024, bf16)]
    sweep += [("sweep", "softmax", 8192, 512, fp32)]
    million = [("long", "softmax", 1 << 20, dims, bf16) for dims in (64, 768)]
    return [_case(*size) for size in [*checks, *bars, *million, *sweep]]


def _case(group: str, form: str, n: int, d: int, dtype: torch.dtype) -> Case:
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Case(
        name=f"{form} N={n} D={d} {short}",
        group=group,
        values={"form": form, "n": n, "d": d, "dtype": short, "passes": "forward and backward"},
        costs=tuple(cost(n, n, d, dtype, backward=back) for back in (False, True)),
        bars=BARS.get(n, ()) if group in ("bar", "long") else (),
        limit=LIMITS[dtype],
        most_rounds=1 if n >= 1 << 20 else 100,
    )


def _dtype(case: Case) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[case.values["dtype"]]


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(case.values["n"])
    shape = (case.values["n"], case.values["d"])
    features = [
        F.normalize(torch.randn(shape, device=device, generator=generator), dim=-1).to(_dtype(case))
        for _ in range(2)
    ]
    numbers = [torch.tensor([value], device=device) for value in (SCALE, BIAS)]
    if case.values["form"] == "softmax":
        numbers.pop()
    return Given([x.requires_grad_() for x in (*features, *numbers)])


def _softmax(op: Kernel) -> Callable[..., Tensor]:
    def loss(*leaves: Tensor) -> Tensor:
        row_lse, column_lse, positive, *_ = op(*leaves)
        return ((row_lse + column_lse) / 2 - positive).mean()

    return loss


def _sigmoid(op: Kernel) -> Callable[..., Tensor]:
    return lambda *leaves: op(*leaves).mean()


FORMS = {"softmax": ("contrastive", _softmax), "sigmoid": ("contrastive_sigmoid", _sigmoid)}


def _step(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Call:
    """The loss and its gradients."""

    def call() -> Outputs:
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return call


def sides(case: Case, device: str) -> list[Side]:
    form = case.values["form"]
    op, loss_of = FORMS[form]
    ours = of_providers(
        op, device, lambda kernel: lambda given: _step(loss_of(kernel(op)), given.leaves)
    )
    if case.group == "check":
        return [side for side in ours if side.kind == "ours"]

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return peers.available(device, form), peers.missing(device, form)

    peers = of_peers(OP, find, lambda loss: lambda given: _step(loss, given.leaves))
    return [*ours, *peers]


def expected(case: Case, given: Given) -> Outputs:
    """By the definition in float64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in given.leaves]
    reference = contrastive if case.values["form"] == "softmax" else contrastive_sigmoid
    _, loss_of = FORMS[case.values["form"]]
    return _step(loss_of(reference), wide)()

"""The fused contrastive loss against peers (peers/contrastive.py), both forms, both passes.

Random features of unit length, 512 dims, logit scale 20. In bfloat16 the peers run under autocast.
`torch_products_s` is what torch takes for as many products as the definition has: one forward,
three backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import extra_mb
from peers import contrastive as peers
from race import DTYPES, OURS, Side, race, row
from torch import Tensor

from carillon.kernels.contrastive.reference import cost
from carillon.kernels.roofline import floor_s
from carillon.kernels.table import resolve

DIMS = 512
# Peers in bfloat16 round their logits to it: 2^-9 of up to 20, which exp() turns into 4%.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.04}


def softmax(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    row_lse, column_lse, positive, _, _ = resolve("contrastive", "cpu")(image, text, scale)
    loss: Tensor = ((row_lse + column_lse) / 2 - positive).mean()
    return loss


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    loss: Tensor = resolve("contrastive_sigmoid", "cpu")(image, text, scale, bias).mean()
    return loss


FUSED: dict[str, peers.Loss] = {"softmax": softmax, "sigmoid": sigmoid}


def features(num_pairs: int, form: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(num_pairs, DIMS, generator=generator) for _ in range(2))
    scalars = [torch.tensor([20.0])] + ([torch.tensor([-10.0])] if form == "sigmoid" else [])
    given = [F.normalize(side, dim=-1).to(dtype) for side in pair] + scalars
    return [value.requires_grad_() for value in given]


def step(loss: Callable[..., Tensor], given: Sequence[Tensor], backward: bool) -> Side:
    if not backward:
        return torch.no_grad()(lambda: [loss(*given)])

    def call() -> list[Tensor]:
        value = loss(*given)
        return [value.detach(), *torch.autograd.grad(value, given)]

    return call


def product_s(dtype: torch.dtype) -> float:
    """One product of 2048 x 512 by 512 x 2048, the best of some."""
    a, b = torch.ones(2048, DIMS, dtype=dtype), torch.ones(DIMS, 2048, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "num_pairs", "backward"),
    [
        *(("softmax", size, False) for size in (1024, 2048, 4096)),
        *(("softmax", size, True) for size in (1024, 2048, 4096, 8192)),
        *(("sigmoid", size, True) for size in (1024, 2048, 4096)),
    ],
)
def test_contrastive(benchmark: Any, form: str, num_pairs: int, backward: bool, dtype: str) -> None:
    given = features(num_pairs, form, DTYPES[dtype])
    sides = {OURS: FUSED[form]} | peers.available("cpu", form)
    race(
        benchmark,
        {name: step(loss, given, backward) for name, loss in sides.items()},
        op="contrastive",
        case=f"{form} {dtype}",
        size=num_pairs,
        unit="pairs",
        work=[
            cost(num_pairs, num_pairs, DIMS, DTYPES[dtype], backward=back)
            for back in (False, True)[: 1 + backward]
        ],
        left_out=peers.missing("cpu", form),
        tolerance=TOLERANCE[dtype],
        backward=backward,
    )
    products = (4 if backward else 1) * (num_pairs / 2048) ** 2
    benchmark.extra_info["torch_products_s"] = round(products * product_s(DTYPES[dtype]), 4)


def test_many_pairs(benchmark: Any) -> None:
    """65,536 pairs in bfloat16, once."""
    num_pairs, dtype = 65_536, torch.bfloat16
    step(softmax, features(64, "softmax", dtype), backward=True)()
    call = step(softmax, features(num_pairs, "softmax", dtype), backward=True)
    extra = benchmark.pedantic(extra_mb, args=(call,), rounds=1)
    held = "its logits would take 17 GB"
    left_out = {"torch": held, "torch.compile": held, "open_clip": held, "inf_cl": "minutes"}
    costs = [cost(num_pairs, num_pairs, DIMS, dtype, backward=back) for back in (False, True)]
    benchmark.extra_info.update(
        row("contrastive", "softmax bf16", num_pairs, "pairs", True, left_out),
        seconds={OURS: round(benchmark.stats.stats.median, 1)},
        ratio={},
        extra_mb={OURS: round(extra, 1)},
        floor_h100_s=sum(map(floor_s, costs)),
    )

"""opcheck of every op, and torch.compile of the whole layer without a break."""

from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.moe_routing.balance import load_balancing_loss
from carillon.kernels.table import OPS, load_native, load_torch, load_triton, resolve

load_native()
INDICES = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
PLAN = resolve("moe_plan", "cpu", "native")(INDICES, 3, 4)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


CALLS: dict[str, tuple[Any, ...]] = {
    "moe_topk": (randn(5, 4), 2, "sigmoid", True, 2.5, torch.zeros(4)),
    "moe_plan": (INDICES, 3, 4, 1),
    "moe_permute": (randn(3, 5), *PLAN[1:]),
    "moe_unpermute": (randn(12, 5), randn(3, 2), *PLAN[1:]),
    "grouped_mm": (randn(12, 5), randn(3, 5, 6), PLAN[0]),
    "gather_grouped_mm": (randn(3, 5), randn(3, 5, 6), *PLAN),
}


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.carillon, op).default, CALLS[op])


@pytest.mark.parametrize("op", CALLS)
def test_opcheck_of_triton(op: str) -> None:
    load_triton()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    overload = getattr(torch.ops.carillon_triton, op).default
    torch.library.opcheck(overload, CALLS[op], test_utils=tests)


@pytest.mark.parametrize("op", [op for op in CALLS if "torch" in OPS[op].providers["cpu"]])
def test_opcheck_of_torch(op: str) -> None:
    load_torch()
    torch.library.opcheck(getattr(torch.ops.carillon_torch, op).default, CALLS[op])


def test_compiled_layer_is_the_eager_one() -> None:
    topk, plan, unpermute, multiply, gather_multiply = (
        resolve(name, "cpu", "native")
        for name in ("moe_topk", "moe_plan", "moe_unpermute", "grouped_mm", "gather_grouped_mm")
    )

    def layer(x: Tensor, logits: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, indices, counts, means, z = topk(logits, 2)
        offsets, *maps = plan(indices, 3, 8)
        hidden = torch.relu(gather_multiply(x, up, offsets, *maps))
        out: Tensor = unpermute(multiply(hidden, down, offsets), weights, *maps)
        return out.sum() + load_balancing_loss(means, counts) + z

    leaves = [randn(7, 6), randn(7, 3), randn(3, 6, 8), randn(3, 8, 6)]
    layer(*leaves).backward()
    eager = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for leaf, wanted in zip(leaves, eager, strict=True):
        assert leaf.grad is not None
        assert wanted is not None
        torch.testing.assert_close(leaf.grad, wanted)

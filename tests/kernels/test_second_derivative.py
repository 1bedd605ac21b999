"""A second derivative is refused by every op that has none, never a wrong number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import resolve


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def contrastive(provider: str) -> tuple[Tensor, Tensor]:
    x = leaf(4, 8)
    found = resolve("contrastive", "cpu", provider)(x, leaf(4, 8, seed=1), torch.ones(1))
    return x, found[0].sum()


def contrastive_sigmoid(provider: str) -> tuple[Tensor, Tensor]:
    x, one = leaf(4, 8), torch.ones(1)
    return x, resolve("contrastive_sigmoid", "cpu", provider)(x, leaf(4, 8, seed=1), one, one).sum()


def moe_topk(provider: str) -> tuple[Tensor, Tensor]:
    x = leaf(4, 8)
    return x, resolve("moe_topk", "cpu", provider)(x, 2)[0].square().sum()


def plan() -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
    offsets, row_to_slot, slot_to_row = resolve("moe_plan", "cpu", "reference")(indices, 3, 4)
    return offsets, row_to_slot, slot_to_row


def moe_permute(provider: str) -> tuple[Tensor, Tensor]:
    x = leaf(3, 8)
    return x, resolve("moe_permute", "cpu", provider)(x, *plan()[1:]).square().sum()


def moe_unpermute(provider: str) -> tuple[Tensor, Tensor]:
    maps = plan()[1:]
    x = leaf(len(maps[0]), 8)
    out = resolve("moe_unpermute", "cpu", provider)(x, torch.ones(3, 2), *maps)
    return x, out.square().sum()


def grouped_mm(provider: str) -> tuple[Tensor, Tensor]:
    offsets, row_to_slot, _ = plan()
    x = leaf(len(row_to_slot), 8)
    out = resolve("grouped_mm", "cpu", provider)(x, leaf(3, 8, 16, seed=1), offsets)
    return x, out.square().sum()


def gather_grouped_mm(provider: str) -> tuple[Tensor, Tensor]:
    x = leaf(3, 8)
    out = resolve("gather_grouped_mm", "cpu", provider)(x, leaf(3, 8, 16, seed=1), *plan())
    return x, out.square().sum()


def packed_attention(provider: str) -> tuple[Tensor, Tensor]:
    x, lengths = leaf(5, 1, 32), torch.tensor([0, 5], dtype=torch.int32)
    out, _ = resolve("packed_attention", "cpu", provider)(x, x, x, lengths, lengths, 5, 5)
    return x, out.square().sum()


OPS: list[Callable[[str], Any]] = [
    *(contrastive, contrastive_sigmoid, moe_topk, moe_permute, moe_unpermute),
    *(grouped_mm, gather_grouped_mm, packed_attention),
]


@pytest.mark.parametrize("provider", ["native", "triton"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_a_second_derivative_is_refused(op: Callable[[str], Any], provider: str) -> None:
    x, loss = op(provider)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("op", [grouped_mm, gather_grouped_mm], ids=lambda op: op.__name__)
def test_torch_refuses_too(op: Callable[[str], Any]) -> None:
    test_a_second_derivative_is_refused(op, "torch")

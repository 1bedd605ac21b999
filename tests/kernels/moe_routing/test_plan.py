"""moe_plan: each provider against a plan made slot by slot."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.moe_routing.reference import num_rows
from carillon.kernels.table import resolve

Kernels = Callable[[str], Callable[..., Any]]
pytestmark = pytest.mark.op("moe_plan")


def indices_of(num_tokens: int, num_experts: int, k: int) -> Tensor:
    """Uneven: low experts are chosen more, and some perhaps never."""
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores -= 0.1 * torch.arange(num_experts)
    return scores.topk(k, dim=1).indices.int()


def slot_by_slot(
    indices: Tensor, num_experts: int, alignment: int, capacity: int | None
) -> tuple[list[int], dict[int, int]]:
    """Offsets, and the row of each slot that is kept."""
    taken: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(indices.flatten().tolist()):
        if capacity is None or len(taken[expert]) < capacity:
            taken[expert].append(slot)
    offsets, rows = [0], {}
    for expert in range(num_experts):
        rows |= {slot: offsets[-1] + rank for rank, slot in enumerate(taken[expert])}
        offsets.append(offsets[-1] + -(-len(taken[expert]) // alignment) * alignment)
    return offsets, rows


@pytest.mark.parametrize(
    ("shape", "alignment", "capacity"),
    [
        ((1, 1, 1), 1, None),
        ((37, 5, 2), 16, None),
        ((37, 5, 2), 1, None),
        ((37, 5, 2), 8, 7),
        ((64, 20, 3), 128, None),
        ((64, 20, 3), 3, 1),
        ((50, 4, 4), 16, 1000),
        ((300, 9, 1), 16, 40),
    ],
    ids=str,
)
def test_matches_a_plan_slot_by_slot(
    kernel: Kernels, shape: tuple[int, int, int], alignment: int, capacity: int | None
) -> None:
    num_tokens, num_experts, k = shape
    indices = indices_of(num_tokens, num_experts, k)
    plan = kernel("moe_plan")(indices, num_experts, alignment, capacity)
    offsets, row_to_slot, slot_to_row = plan
    wanted_offsets, rows = slot_by_slot(indices, num_experts, alignment, capacity)
    assert all(tensor.dtype == torch.int32 for tensor in plan)
    assert offsets.tolist() == wanted_offsets
    assert slot_to_row.flatten().tolist() == [rows.get(s, -1) for s in range(indices.numel())]
    slots = {row: slot for slot, row in rows.items()}
    size = num_rows(indices.numel(), num_experts, alignment, capacity)
    assert row_to_slot.tolist() == [slots.get(row, -1) for row in range(size)]


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_many_slots_cross_chunks(provider: str) -> None:
    indices = indices_of(5000, 11, 3)
    plan = resolve("moe_plan", "cpu", provider)(indices, 11, 16, 2000)
    offsets, rows = slot_by_slot(indices, 11, 16, 2000)
    assert plan[0].tolist() == offsets
    assert plan[2].flatten().tolist() == [rows.get(s, -1) for s in range(15000)]


@pytest.mark.parametrize("alignment", [1, 3, 16])
def test_rows_suffice_for_any_choice_and_are_not_many_more(alignment: int) -> None:
    for num_slots in (0, 1, 2, 7, 40):
        for num_experts in (1, 3, 8):
            for capacity in (None, 1, 5):
                size = num_rows(num_slots, num_experts, alignment, capacity)
                spread = [num_slots // num_experts + (e < num_slots % num_experts)
                          for e in range(num_experts)]  # fmt: skip
                for counts in ([num_slots], [min(1, num_slots)] * num_experts, spread):
                    if sum(counts) > num_slots:
                        continue
                    kept = [min(n, num_slots if capacity is None else capacity) for n in counts]
                    assert sum(-(-n // alignment) * alignment for n in kept) <= size
                assert size <= num_slots + num_experts * (alignment - 1)


def test_no_tokens(kernel: Kernels) -> None:
    indices = torch.zeros(0, 2, dtype=torch.int32)
    offsets, row_to_slot, slot_to_row = kernel("moe_plan")(indices, 3)
    assert offsets.tolist() == [0] * 4
    assert row_to_slot.shape == (0,)
    assert slot_to_row.shape == (0, 2)


def test_strided_indices(kernel: Kernels) -> None:
    indices = indices_of(40, 8, 4)[::2, 1::2]
    assert not indices.is_contiguous()
    op = kernel("moe_plan")
    for got, want in zip(op(indices, 8), op(indices.contiguous(), 8), strict=True):
        assert torch.equal(got, want)


def test_one_and_two_threads_agree() -> None:
    indices = indices_of(20_000, 16, 2)
    op = resolve("moe_plan", "cpu", "native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op(indices, 16, 16, 2500)
        torch.set_num_threads(2)
        two = op(indices, 16, 16, 2500)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

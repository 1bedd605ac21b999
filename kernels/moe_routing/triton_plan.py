"""moe_plan in Triton: counts by chunk of slots, a scan by torch, then each slot's row.

A slot's rank in its chunk is how many earlier slots of the chunk chose the same expert, counted by
comparing all pairs: exact, stable, without atomics, and independent of the number of experts.
Status: compiled for sm_90 and run in the interpreter; not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from carillon.kernels.moe_routing.reference import num_rows

CHUNK = 128
PLACE_WARPS = 8  # for its 128 x 128 comparisons


@triton.jit
def count_kernel(
    indices_ptr, counts_ptr, num_slots, num_experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    slots = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(indices_ptr + slots, mask=slots < num_slots, other=-1)
    valid = (expert >= 0) & (expert < num_experts)
    bins = tl.arange(0, BLOCK_E)
    counts = tl.histogram(tl.where(valid, expert, 0), BLOCK_E, mask=valid)
    to = tl.program_id(0) * num_experts + bins
    tl.store(counts_ptr + to, counts, mask=bins < num_experts)


@triton.jit
def place_kernel(
    indices_ptr, first_rank_ptr, offsets_ptr, row_to_slot_ptr, slot_to_row_ptr,
    num_slots, num_experts, capacity, num_rows, CHUNK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * CHUNK
    mine, other = tl.arange(0, CHUNK), tl.arange(0, CHUNK)
    in_slots = start + mine < num_slots
    expert = tl.load(indices_ptr + start + mine, mask=in_slots, other=-1)
    others = tl.load(indices_ptr + start + other, mask=start + other < num_slots, other=-1)
    valid = (expert >= 0) & (expert < num_experts)
    earlier = (expert[:, None] == others[None, :]) & (other[None, :] < mine[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    rank += tl.load(first_rank_ptr + tl.program_id(0) * num_experts + expert, mask=valid, other=0)
    row = tl.load(offsets_ptr + expert, mask=valid, other=0) + rank
    kept = valid & (rank < capacity) & (row < num_rows)
    tl.store(slot_to_row_ptr + start + mine, tl.where(kept, row, -1), mask=in_slots)
    tl.store(row_to_slot_ptr + row, start + mine, mask=kept)


def plan(
    indices_TK: Tensor, num_experts: int, alignment: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_slots, device = indices_TK.numel(), indices_TK.device
    indices_TK = indices_TK.contiguous()
    size = num_rows(num_slots, num_experts, alignment, capacity)
    most = num_slots if capacity is None else min(capacity, num_slots)
    programs = triton.cdiv(num_slots, CHUNK)
    counts_CE = torch.zeros(programs, num_experts, dtype=torch.int32, device=device)
    row_to_slot_R = torch.full((size,), -1, dtype=torch.int32, device=device)
    slot_to_row_TK = torch.empty_like(indices_TK)
    if programs:
        count_kernel[(programs,)](
            indices_TK, counts_CE, num_slots, num_experts,
            CHUNK=CHUNK, BLOCK_E=max(triton.next_power_of_2(num_experts), 2),
        )  # fmt: skip
    ranks_CE = counts_CE.cumsum(0, dtype=torch.int32)
    kept_E = counts_CE.sum(0, dtype=torch.int32).clamp(max=most)
    padded_E = (kept_E + alignment - 1) // alignment * alignment
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    torch.cumsum(padded_E, 0, dtype=torch.int32, out=offsets[1:])
    if programs:
        place_kernel[(programs,)](
            indices_TK, ranks_CE - counts_CE, offsets, row_to_slot_R, slot_to_row_TK,
            num_slots, num_experts, most, size, CHUNK=CHUNK, num_warps=PLACE_WARPS,
        )  # fmt: skip
    return offsets, row_to_slot_R, slot_to_row_TK

"""packed_attention against peers (peers/packed_attention.py), both passes.

12 heads of 64. Equal lengths are those of ViT-B at 224/32, 224/16 and 384/16; mixed ones lie
between 10 and 577 tokens, and the longest is in every mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peers import packed_attention as peers
from race import DTYPES, OURS, PASSES, Side, race
from torch import Tensor

from carillon.kernels.packed_attention.reference import cost
from carillon.kernels.table import resolve

HEADS, HEAD_DIM = 12, 64
EQUAL = {50: 32, 197: 8, 577: 2}  # tokens, sequences
MIX = (577, 517, 230, 258, 521, 563, 293, 543, 465, 274, 26, 467, 102, 105, 10, 182)
MIXES = {len(mix): mix for mix in (MIX[::4], MIX[::2], MIX)}
# A bfloat16 result is within 2^-9 of its value; the peers round the weights to it too.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=PASSES)


def fused(lengths: Sequence[int]) -> peers.Peer:
    op = resolve("packed_attention", "cpu")
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rest = (starts, starts, max(lengths), max(lengths))
    return peers.Peer(lambda x: x, lambda *qkv: op(*qkv, *rest)[0], lambda x: x)


def step(side: peers.Peer, qkv: Sequence[Tensor], grad: Tensor, backward: bool) -> Side:
    inputs = [side.lay_out(x).requires_grad_(backward) for x in qkv]
    grad_out = side.lay_out(grad)
    if not backward:
        return torch.no_grad()(lambda: [side.attend(*inputs)])

    def call() -> list[Tensor]:
        out = side.attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

    return call


def race_lengths(
    benchmark: Any, lengths: Sequence[int], dtype: str, backward: bool, **names: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    *qkv, grad = (
        torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator).to(DTYPES[dtype])
        for _ in range(4)
    )
    given = ("cpu", lengths, DTYPES[dtype])
    sides = {OURS: fused(lengths)} | peers.available(*given, backward=backward)
    sizes = (list(lengths), list(lengths), HEADS, HEADS, HEAD_DIM, DTYPES[dtype])
    race(
        benchmark,
        {name: step(side, qkv, grad, backward) for name, side in sides.items()},
        op="packed_attention",
        work=[cost(*sizes, backward=back) for back in (False, True)[: 1 + backward]],
        left_out=peers.missing(*given, backward=backward),
        tolerance=TOLERANCE[dtype],
        comparable={name: side.pack for name, side in sides.items()},
        backward=backward,
        **names,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@BACKWARD
@pytest.mark.parametrize("length", EQUAL)
def test_equal_lengths(benchmark: Any, length: int, backward: bool, dtype: str) -> None:
    names = {"case": f"equal lengths {dtype}", "size": length, "unit": "tokens each"}
    race_lengths(benchmark, (length,) * EQUAL[length], dtype, backward, **names)


@pytest.mark.parametrize("dtype", DTYPES)
@BACKWARD
@pytest.mark.parametrize("num_sequences", MIXES)
def test_mixed_lengths(benchmark: Any, num_sequences: int, backward: bool, dtype: str) -> None:
    names = {"case": f"lengths 10-577 {dtype}", "size": num_sequences, "unit": "sequences"}
    race_lengths(benchmark, MIXES[num_sequences], dtype, backward, **names)

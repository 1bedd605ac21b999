"""packed_attention against torch's scaled_dot_product_attention, forward and backward, one thread.

Run by `pytest benchmarks/test_packed_attention.py --benchmark-json=FILE`. On a mix of lengths the
peer gets the batch padded to its longest sequence and a key mask, as models without packing do; on
equal lengths no mask, which lets it take its fused kernels. Its (batch, heads, tokens, head_dim) is
a view of the projection's output, as in a model. Rounds alternate; the ratio is of medians of
process time, above 1 where ours is faster. The floor is that of an H100 (kernels/roofline.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.packed_attention.reference import cost
from carillon.kernels.roofline import H100, floor_s
from carillon.kernels.table import resolve

HEADS, HEAD_DIM = 12, 64
EQUAL = {50: 32, 197: 8, 577: 2}  # tokens of ViT-B at 224/32, 224/16 and 384/16; sequences
MIX = (577, 517, 230, 258, 521, 563, 293, 543, 465, 274, 26, 467, 102, 105, 10, 182)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    return [torch.randn(*shape, HEADS, HEAD_DIM).to(dtype).requires_grad_(i < 3) for i in range(4)]


def step(attend: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Callable[[], Any]:
    *inputs, grad_out = tensors
    if backward:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, grad_out)
    return torch.no_grad()(lambda: attend(*inputs))


def ours(lengths: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
    op = resolve("packed_attention", "cpu")
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rest = (starts, starts, max(lengths), max(lengths))
    return step(lambda *qkv: op(*qkv, *rest)[0], draw(sum(lengths), dtype=dtype), backward)


def peer(lengths: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]

    def attend(*qkv: Tensor) -> Tensor:
        heads = [x.transpose(1, 2) for x in qkv]
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    return step(attend, draw(len(lengths), longest, dtype=dtype), backward)


def race(
    benchmark: Any, lengths: tuple[int, ...], dtype: torch.dtype, backward: bool, bar: float
) -> None:
    sides = {"packed": ours(lengths, dtype, backward), "sdpa": peer(lengths, dtype, backward)}
    took: dict[str, list[float]] = {name: [] for name in sides}

    def turn(name: str) -> None:
        start = time.process_time()
        sides[name]()
        took[name].append(time.process_time() - start)

    benchmark.pedantic(
        lambda: turn("packed"), setup=lambda: turn("sdpa"), rounds=9, warmup_rounds=2
    )
    median = {name: statistics.median(times) for name, times in took.items()}
    sizes = (list(lengths), list(lengths), HEADS, HEADS, HEAD_DIM, dtype)
    costs = [cost(*sizes)] + ([cost(*sizes, backward=True)] if backward else [])
    benchmark.extra_info.update(
        torch=torch.__version__,
        num_threads=1,
        median_process_ms={name: round(1e3 * value, 2) for name, value in median.items()},
        gigaflop_per_s=round(sum(c.flops for c in costs) / median["packed"] / 1e9),
        h100_floor_ms=round(1e3 * sum(floor_s(c, H100) for c in costs), 5),
        ratio=round(median["sdpa"] / median["packed"], 2),
        bar=bar,
    )
    assert benchmark.extra_info["ratio"] >= bar


@DTYPES
@PASSES
@pytest.mark.parametrize("length", EQUAL)
def test_equal_lengths(benchmark: Any, length: int, dtype: torch.dtype, backward: bool) -> None:
    race(benchmark, (length,) * EQUAL[length], dtype, backward, bar=1.0)


@DTYPES
@PASSES
def test_mixed_lengths(benchmark: Any, dtype: torch.dtype, backward: bool) -> None:
    race(benchmark, MIX, dtype, backward, bar=2.0)

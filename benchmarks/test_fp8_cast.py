"""fp8_cast, row and column copies, against the composition in torch.

Run by `pytest benchmarks/test_fp8_cast.py --benchmark-json=FILE`, on one thread. The sides take
turns, and the ratio is the median over turns of torch's time over ours, of the core's time, because
other work on the machine does not enter it. Two compositions: "float32" rounds as the op does;
"bfloat16" divides in bfloat16, so it rounds twice and is cheaper. The bar is held against the
first. No backward: the op has none. Output buffers are fresh at each call, so page faults are part
of the time.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import BLOCK, GRANULARITIES
from carillon.kernels.fp8_cast.reference import FP8_MAX, cost
from carillon.kernels.roofline import floor_s
from carillon.kernels.table import resolve

E4M3 = torch.float8_e4m3fn
BAR = 2.0  # at 4096 x 4096 in bfloat16


def quantised(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """abs, amax, div, clamp, to: sizes are multiples of 128."""
    height, width = {
        "tensorwise": x.shape,
        "rowwise": (1, x.shape[1]),
        "1x128": (1, BLOCK),
        "128x128": (BLOCK, BLOCK),
    }[granularity]
    groups = x.view(x.shape[0] // height, height, x.shape[1] // width, width)
    scale = groups.abs().amax((1, 3), keepdim=True) / FP8_MAX[E4M3]
    codes = groups.div(scale).clamp_(-FP8_MAX[E4M3], FP8_MAX[E4M3]).to(E4M3)
    return codes.view(x.shape), scale.squeeze((1, 3))


def composition(x: Tensor, granularity: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = x.to(dtype)
    row, row_scale = quantised(x, granularity)
    if granularity in ("tensorwise", "128x128"):
        return row, row_scale, row.t().contiguous(), row_scale.t()
    return row, row_scale, *quantised(x.t().contiguous(), granularity)


def core_s(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "given"])
@pytest.mark.parametrize("size", [1024, 4096])
def test_fp8_cast(benchmark: Any, granularity: str, size: int) -> None:
    x = torch.randn(size, size).bfloat16()
    op = resolve("fp8_cast", "cpu")
    scale = torch.tensor(0.01) if granularity == "given" else None
    kind = "tensorwise" if granularity == "given" else granularity
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: op(x, kind, E4M3, scale, column=True),
        "float32": lambda: composition(x, kind, torch.float32),
        "bfloat16": lambda: composition(x, kind, torch.bfloat16),
        "copy": x.clone,
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()

    def others() -> None:
        for name in list(sides)[1:]:
            took[name].append(core_s(sides[name]))

    benchmark.pedantic(lambda: took["ours"].append(core_s(sides["ours"])), setup=others, rounds=9)
    median_s = {name: statistics.median(times) for name, times in took.items()}
    ratio = {
        name: round(statistics.median(t / o for t, o in zip(times, took["ours"], strict=True)), 2)
        for name, times in took.items()
    }
    work = cost(size, size, x.element_size(), column=True)
    benchmark.extra_info.update(
        torch=torch.__version__,
        num_threads=torch.get_num_threads(),
        core_s={name: round(value, 5) for name, value in median_s.items()},
        gigabytes_per_s=round(work.size_bytes / median_s["ours"] / 1e9, 2),
        h100_floor_s=floor_s(work),
        ratio=ratio,
        bar=BAR if size == 4096 else None,
    )
    if size == 4096:
        assert ratio["float32"] >= BAR

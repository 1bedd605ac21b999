"""fp8_cast, row and column copies of a bfloat16 matrix, against peers (peers/fp8_cast.py).

No backward: the op has none. Codes are e4m3. "given scale" is tensorwise with the scale of delayed
scaling.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peers import fp8_cast as peers
from race import OURS, race
from torch import Tensor

from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import cost
from carillon.kernels.table import resolve

# A scale rounded to bfloat16 moves 3% of the codes to a neighbour, at most 1/8 away.
TOLERANCE = 0.03


def fused(x: Tensor, granularity: str, scale: Tensor | None) -> tuple[Tensor, ...]:
    row, row_scale, column, column_scale, _ = resolve("fp8_cast", "cpu")(
        x, granularity, peers.E4M3, scale, column=True
    )
    return row, row_scale, column, column_scale


@pytest.mark.parametrize("size", [1024, 2048, 4096])
@pytest.mark.parametrize("granularity", [*GRANULARITIES, "given scale"])
def test_fp8_cast(benchmark: Any, granularity: str, size: int) -> None:
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    given = granularity == "given scale"
    call = (x, "tensorwise" if given else granularity, torch.tensor(0.01) if given else None)
    sides = {OURS: fused} | peers.available("cpu")
    race(
        benchmark,
        {name: partial(side, *call) for name, side in sides.items()},
        op="fp8_cast",
        case=granularity,
        size=size,
        unit="rows and columns",
        work=[cost(size, size, x.element_size(), column=True)],
        left_out=peers.missing("cpu"),
        tolerance=TOLERANCE,
        comparable=dict.fromkeys(sides, Tensor.flatten),
    )

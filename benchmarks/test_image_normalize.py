"""image_normalize against peers (peers/image_normalize.py).

Bytes are those that must move: every picture read once and every value written once. Output
buffers past the allocator's limit of 32 MiB are fresh at each call, so page faults are part of the
time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import image_normalize as peers
from race import DTYPES, OURS, race

from carillon.kernels.roofline import Cost
from carillon.kernels.table import resolve

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = {"fp32": 1e-5, "bf16": 0.004}  # one rounding of bfloat16 is 2^-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pixels", "batch"), [(64, 16), (64, 64), (64, 256), (224, 8), (224, 32), (224, 128)]
)
def test_image_normalize(benchmark: Any, pixels: int, batch: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, pixels, pixels, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    call = (images, MEAN, STD, DTYPES[dtype])
    sides = {OURS: resolve("image_normalize", "cpu")} | peers.available("cpu")
    num_values = images.numel()
    race(
        benchmark,
        {name: lambda side=side: [side(*call)] for name, side in sides.items()},
        op="image_normalize",
        case=f"{pixels} px, {dtype}",
        size=batch,
        unit="pictures",
        work=[Cost(flops=0.0, size_bytes=float(num_values * (1 + DTYPES[dtype].itemsize)))],
        left_out=peers.missing("cpu"),
        tolerance=TOLERANCE[dtype],
    )

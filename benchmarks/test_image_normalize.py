"""image_normalize against the same composition in torch: pictures/s and memory bandwidth.

Run by `pytest benchmarks/test_image_normalize.py --benchmark-json=FILE`. Bytes are those that must
move: every picture read once and every value written once. Output buffers are fresh at each call,
as in training, so past the allocator's limit of 32 MiB page faults are part of the time.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import OPS, resolve

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def composition(
    images_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The least torch needs: one converting copy, one multiply-add in place, one cast."""
    scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
    shift = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)
    planes = images_NHWC.permute(0, 3, 1, 2)
    out = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.addcmul(shift, out, scale, out=out).to(dtype)


@pytest.mark.parametrize("provider", [*OPS["image_normalize"].providers["cpu"], "composition"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "size"), [(256, 64), (32, 224)], ids=["256x64", "32x224"])
def test_image_normalize(
    benchmark: Any, provider: str, dtype: torch.dtype, batch: int, size: int
) -> None:
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    composed = provider == "composition"
    op = composition if composed else resolve("image_normalize", "cpu", provider)
    benchmark.pedantic(
        op, args=(images, MEAN, STD, dtype), rounds=20, warmup_rounds=3, iterations=2
    )
    median_s = benchmark.stats.stats.median
    size_bytes = images.numel() * (1 + dtype.itemsize)
    benchmark.extra_info.update(
        torch=torch.__version__,
        num_threads=torch.get_num_threads(),
        images_per_s=round(batch / median_s),
        gigabytes_per_s=round(size_bytes / median_s / 1e9, 2),
    )

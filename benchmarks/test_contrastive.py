"""The fused contrastive loss against torch's own: forward and backward, time and extra memory.

The reference is what trainers do: the logits of a batch as one product, cross-entropy of their rows
and of their columns; in bfloat16 under autocast. Sides take turns, medians are compared. Memory is
the growth of the process's peak over what was resident before, measured in a process of its own.
Beside them: four products (one forward, three backward) at the rate of torch's own on this machine,
and the floor of an H100.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.kernels.contrastive.reference import cost
from carillon.kernels.roofline import floor_s
from carillon.kernels.table import resolve

DIMS = 512
BARS = {torch.float32: 1.3, torch.bfloat16: 2.5}  # at 8192 pairs
MOST_MEMORY = 0.1  # of the reference's

Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    row_lse, column_lse, positive, _, _ = resolve("contrastive", "cpu")(image, text, scale)
    loss: Tensor = ((row_lse + column_lse) / 2 - positive).mean()
    return loss


def composed(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(image))
    with torch.autocast("cpu", torch.bfloat16, enabled=image.dtype == torch.bfloat16):
        logits = scale * (image @ text.T)
        loss = F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)
    return loss / 2


SIDES: dict[str, Side] = {"carillon": fused, "torch": composed}


def features(num_pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (F.normalize(torch.randn(num_pairs, DIMS), dim=-1).to(dtype) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor([20.0], requires_grad=True)


def step_s(side: Side, given: tuple[Tensor, Tensor, Tensor]) -> float:
    began = time.perf_counter()
    torch.autograd.backward(side(*given))
    took = time.perf_counter() - began
    for one in given:
        one.grad = None
    return took


def product_s(dtype: torch.dtype) -> float:
    """One product of 2048 x 512 by 512 x 2048, the best of some."""
    a, b = torch.ones(2048, DIMS, dtype=dtype), torch.ones(DIMS, 2048, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_pairs", [1024, 8192])
def test_contrastive(benchmark: Any, num_pairs: int, dtype: torch.dtype) -> None:
    given = features(num_pairs, dtype)
    took: dict[str, list[float]] = {name: [] for name in SIDES}
    for side in SIDES.values():
        step_s(side, given)
    benchmark.pedantic(
        lambda: took["carillon"].append(step_s(fused, given)),
        setup=lambda: took["torch"].append(step_s(composed, given)),
        rounds=5 if num_pairs > 4000 else 15,
    )
    medians = {name: statistics.median(times) for name, times in took.items()}
    ratio = statistics.median(a / b for a, b in zip(took["torch"], took["carillon"], strict=True))
    memory = {name: extra_mb(name, num_pairs, dtype) for name in SIDES}
    benchmark.extra_info.update(
        num_threads=torch.get_num_threads(),
        seconds={name: round(median, 4) for name, median in medians.items()},
        ratio=round(ratio, 2),
        bar=BARS[dtype],
        four_torch_products_s=round(4 * product_s(dtype) * (num_pairs / 2048) ** 2, 4),
        floor_on_h100_s=sum(
            floor_s(cost(num_pairs, num_pairs, DIMS, dtype, backward=back))
            for back in (False, True)
        ),
        extra_mb={name: round(value, 1) for name, value in memory.items()},
        memory_share=round(memory["carillon"] / memory["torch"], 3),
    )
    if num_pairs == 8192:
        assert ratio >= BARS[dtype]
        assert memory["carillon"] <= MOST_MEMORY * memory["torch"]


def test_many_pairs(benchmark: Any) -> None:
    """65,536 pairs in bfloat16, whose logits would take 17 GB: once, with the memory it takes."""
    extra = benchmark.pedantic(extra_mb, args=("carillon", 65_536, torch.bfloat16), rounds=1)
    benchmark.extra_info.update(extra_mb=round(extra, 1), bar_mb=1000)
    assert extra < 1000


def extra_mb(side: str, num_pairs: int, dtype: torch.dtype) -> float:
    """Growth of the peak over what was resident before the step, in a process of its own."""
    command = [sys.executable, __file__, side, str(num_pairs), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _status_kb(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def main() -> None:
    side, num_pairs, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    step_s(SIDES[side], features(64, dtype))  # libraries and their first allocations
    given = features(num_pairs, dtype)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    before = _status_kb("VmRSS")
    step_s(SIDES[side], given)
    print(json.dumps((_status_kb("VmHWM") - before) / 1024))


if __name__ == "__main__":
    main()

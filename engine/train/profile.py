"""What a step does and how fast: FLOPs counted from the batch's real lengths, and rates.

Model FLOPs: each caption at its own length (attention is quadratic in it), each picture by its
patches, forward once and backward twice that. What is computed again (recompute, the first pass of
cached gradients) and padding are no part of them. `computed` counts a batch as it is laid out, each
caption as long as the longest of its process, or in a row with the padding of that: by it a process
is late or early.
A known GPU's dense bf16 peak comes from its data sheet; any other device is measured once with a
large product, so on a CPU the figure is a share of what its matrix library reaches.
Status: the CUDA branch has not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from carillon.engine.data.packed_captions import CaptionRows
from carillon.engine.data.pairs import Batch

_DATA_SHEET_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one process's device. Units: multiply-adds count as two."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for chip, peak in _DATA_SHEET_BF16.items():
            if chip in name:
                return peak
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        _finish(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Work(NamedTuple):
    """What forward and backward of a batch take: tokens of text, model FLOPs, FLOPs as laid out."""

    tokens: int
    flops: float
    computed: float


def work_of_pairs(batch: Batch, flops_per_sample: Callable[[int, int], int]) -> Work:
    """Of one process's share, which is read on the host: call it before it is moved.

    `flops_per_sample`: a forward pass of a picture of so many pixels a side and a caption of so
    many tokens.
    """
    size, padded = batch.images.shape[1], batch.tokens.shape[1]
    lengths = Counter(batch.lengths.tolist())
    flops = sum(num * flops_per_sample(size, length) for length, num in lengths.items())
    return Work(
        tokens=sum(num * length for length, num in lengths.items()),
        flops=3.0 * flops,
        computed=3.0 * len(batch.keys) * flops_per_sample(size, padded),
    )


def work_of_rows(batch: CaptionRows, flops_per_token: Callable[[int], int]) -> Work:
    """The same of rows: each caption for itself; as laid out there is padding, too.

    `flops_per_token`: a forward pass of a token among so many.
    """

    def flops(lengths: Counter[int]) -> float:
        return 3.0 * sum(num * own * flops_per_token(own) for own, num in lengths.items() if own)

    lengths = Counter(batch.lengths().tolist())
    padding = Counter(batch.padding().tolist())
    return Work(
        tokens=sum(num * own for own, num in lengths.items()),
        flops=flops(lengths),
        computed=flops(lengths + padding),
    )


class GlobalWork(NamedTuple):
    """Of a global batch; `computed` for each data rank, all copies of a model counted once."""

    tokens: float
    flops: float
    computed: Sequence[float]


class Throughput:
    """Rates between two log lines, and what of the time and of the work was for nothing."""

    def __init__(
        self,
        peak: float,
        world_size: int,
        rate_name: str = "images_per_s",
        stage_imbalance: float = 1.0,
    ) -> None:
        self._peak, self._world_size, self._rate_name = peak, world_size, rate_name
        self._stage_imbalance = stage_imbalance
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._rows, self._tokens, self._flops, self._waited_s = 0, 0.0, 0.0, 0.0
        self._computed, self._largest, self._mean = 0.0, 0.0, 0.0

    def add(self, *, rows: int, work: GlobalWork, waited_s: float) -> None:
        """Count one step: global pairs or rows, their work, seconds waited for data."""
        self._rows += rows
        self._tokens += work.tokens
        self._flops += work.flops
        self._waited_s += waited_s
        self._computed += sum(work.computed)
        # Ranks meet in each step, so the largest counts by step and not over the window.
        self._largest += max(work.computed)
        self._mean += sum(work.computed) / len(work.computed)

    def exclude(self, seconds: float) -> None:
        """Leave time out of the rates: evaluation, a save that had to wait."""
        self._since += seconds

    def rates(self, communication: float | None) -> dict[str, float]:
        """What docs/run-a-recipe.md lists, since the last call.

        `communication` is its share of a step, data aside; none where it was not measured.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        per_process = self._flops / elapsed / self._world_size
        data_share = self._waited_s / elapsed
        rates = {
            self._rate_name: self._rows / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "tflops": per_process / 1e12,
            "mfu": per_process / self._peak,
            "data_share": data_share,
        }
        if communication is not None:
            rates["communication_share"] = (1 - data_share) * communication
            rates["compute_share"] = (1 - data_share) * (1 - communication)
        rates["imbalance"] = self._largest / self._mean * self._stage_imbalance
        rates["padding_share"] = 1 - self._flops / self._computed
        self._start()
        return rates

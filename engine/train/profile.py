"""Model FLOP/s utilisation: FLOPs counted from the batch's real lengths over the device's peak.

A known GPU's dense bf16 peak comes from its data sheet; any other device is measured once with a
large product, so on a CPU the figure is a share of what its matrix library reaches.
Status: the CUDA branch has not run on a GPU yet.
"""

from __future__ import annotations

import time

import torch

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


class Throughput:
    """Rates between two log lines, and the share of time spent waiting for data."""

    def __init__(self, peak: float, world_size: int) -> None:
        self._peak = peak * world_size
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._pairs, self._flops, self._waited_s = 0, 0.0, 0.0

    def add(self, *, pairs: int, flops: float, waited_s: float) -> None:
        """Count one step: global pairs, global FLOPs (forward and backward), seconds waited."""
        self._pairs += pairs
        self._flops += flops
        self._waited_s += waited_s

    def exclude(self, seconds: float) -> None:
        """Leave time out of the rates: evaluation, a save that had to wait."""
        self._since += seconds

    def rates(self) -> dict[str, float]:
        """images_per_s, mfu and data_share since the last call."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "images_per_s": self._pairs / elapsed,
            "mfu": self._flops / elapsed / self._peak,
            "data_share": self._waited_s / elapsed,
        }
        self._start()
        return rates

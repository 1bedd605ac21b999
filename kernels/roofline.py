"""What an operation must cost at least: FLOPs over the chip's product rate, bytes over its memory.

The floor is the longer of the two, so it holds for any kernel; measured time over it says how much
is left. Rates are those that a plain product and a plain copy reach, not the data sheet's.
Each op's `cost` (in its reference.py) says what must be computed and moved.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Work that any implementation must do. Units: FLOPs (a multiply-add is two), bytes moved."""

    flops: float
    size_bytes: float


class Chip(NamedTuple):
    """Rates of one device. Units: FLOP/s of dense bf16 products, bytes/s of a copy."""

    name: str
    flops_per_s: float
    bytes_per_s: float


# Measured with torch 2.11 and CUDA 13.0: an 8192-cube bf16 product, a large copy.
H100 = Chip("H100 80 GB", flops_per_s=798e12, bytes_per_s=3.0e12)
H200 = Chip("H200", flops_per_s=788e12, bytes_per_s=4.3e12)
_BY_DEVICE_NAME = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}


def floor_s(cost: Cost, chip: Chip = H100) -> float:
    """Seconds below which the operation cannot be on `chip`."""
    return max(cost.flops / chip.flops_per_s, cost.size_bytes / chip.bytes_per_s)


def chip_named(device_name: str) -> Chip | None:
    """The chip of torch.cuda.get_device_name(), where its rates are known."""
    return _BY_DEVICE_NAME.get(device_name)

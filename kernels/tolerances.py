"""How far a provider may stand from its reference: one entry per op and output dtype.

A bound is absolute plus relative (|got - wanted| <= atol + rtol * |wanted|), against the
definition evaluated in float64. It is set from the arithmetic, then confirmed by measurement, and
never widened to make a provider pass.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Bound on the difference of one value."""

    atol: float
    rtol: float


TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # x * scale + shift in float32: three roundings (scale, shift, sum) of terms of size at most
    # about |x / 255 / std| + |mean / std|, under 8 for any usual mean and std, so
    # 3 * 8 * 2^-24 = 1.4e-6. Absolute, because the two terms cancel near the mean.
    ("image_normalize", torch.float32): Tolerance(atol=1.5e-6, rtol=0.0),
    # The same, then one rounding to bfloat16: half a unit in the last of 8 bits, 2^-8 relative.
    ("image_normalize", torch.bfloat16): Tolerance(atol=1.5e-6, rtol=2.0**-8),
    # Codes against x / scale: the inverse scale and the product are rounded to float32 (2^-24
    # each), the code to 3 bits, half a unit of which is 2^-4 of a normal value and half of the
    # smallest subnormal, 2^-10, below those. Providers agree with the reference to the bit.
    ("fp8_cast", torch.float8_e4m3fn): Tolerance(atol=2.0**-10, rtol=2.0**-4 + 2.0**-22),
    # The same with 2 bits, and a smallest subnormal of 2^-16.
    ("fp8_cast", torch.float8_e5m2): Tolerance(atol=2.0**-17, rtol=2.0**-3 + 2.0**-22),
    # Scales: one rounded division, 2^-24 relative; they are above the subnormal numbers.
    ("fp8_cast", torch.float32): Tolerance(atol=0.0, rtol=2.0**-24),
}

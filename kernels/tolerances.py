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
    # exp(x - max) inherits the rounding of its argument, of size at most 88 before exp is 0:
    # 88 * 2^-24 = 5.2e-6 relative; exp itself, sums and divisions add a few units of 2^-24. The
    # absolute part is for scores below it (a float32 exp ends at 1e-38), and for gradients where
    # g - mean(g) cancels: a few units of 2^-24 of gradients of size 1.
    ("moe_topk", torch.float32): Tolerance(atol=1e-6, rtol=6e-6),
    # The gradient of bfloat16 logits: the same, rounded once.
    ("moe_topk", torch.bfloat16): Tolerance(atol=1e-6, rtol=2.0**-8),
    # Integers: exact.
    ("moe_plan", torch.int32): Tolerance(atol=0.0, rtol=0.0),
    # Forward is a copy; the gradient adds k rows in float32: k - 1 roundings of sums of size at
    # most about 16 (k = 8 values of unit size): 7 * 16 * 2^-24 = 6.7e-6.
    ("moe_permute", torch.float32): Tolerance(atol=7e-6, rtol=0.0),
    ("moe_permute", torch.bfloat16): Tolerance(atol=7e-6, rtol=2.0**-8),
    # k products, added in float32: 2k roundings of sums of size at most about 8, as above. The
    # gradient of a weight is a dot product of D terms, whose D roundings of partial sums of size
    # sqrt(D) walk randomly: for D <= 300, 4 * sqrt(300) * 17 * 2^-24 = 7e-5 at four deviations.
    ("moe_unpermute", torch.float32): Tolerance(atol=7e-5, rtol=0.0),
    ("moe_unpermute", torch.bfloat16): Tolerance(atol=7e-5, rtol=2.0**-8),
    # Dot products of at most 300 terms of unit size in float32: as moe_unpermute's.
    ("grouped_mm", torch.float32): Tolerance(atol=7e-5, rtol=0.0),
    ("grouped_mm", torch.bfloat16): Tolerance(atol=7e-5, rtol=2.0**-8),
    ("gather_grouped_mm", torch.float32): Tolerance(atol=7e-5, rtol=0.0),
    # The gradient of x adds k rows that were rounded to bfloat16 and may cancel: for k = 3 rows of
    # size at most 1 (tests scale the weights to that), 3 * 2^-9 = 6e-3.
    ("gather_grouped_mm", torch.bfloat16): Tolerance(atol=6e-3, rtol=2.0**-8),
}

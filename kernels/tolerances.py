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
    # Relative to the largest value of each result. A logit sums up to 8 K products in float32
    # (about sqrt(D) 2^-24 of its size, up to 100), which an exponential turns into a relative
    # error of as much: 100 * 2^-24 = 6e-6, and a gradient sums hundreds of such terms of both
    # signs. Measured: at most 1.4e-6.
    ("contrastive", torch.float32): Tolerance(atol=1e-6, rtol=1e-5),
    # The derivative by a logit is rounded to bfloat16 before its products, and so is the gradient:
    # each half a unit in the last of 8 bits, 2^-8 = 3.9e-3. Float32 results are as above.
    ("contrastive", torch.bfloat16): Tolerance(atol=1e-6, rtol=2.0**-7),
    # As above; the losses are sums of positive terms.
    ("contrastive_sigmoid", torch.float32): Tolerance(atol=1e-6, rtol=1e-5),
    ("contrastive_sigmoid", torch.bfloat16): Tolerance(atol=1e-6, rtol=2.0**-7),
    # The gradients among the results above, by the same arithmetic.
    ("contrastive_backward", torch.float32): Tolerance(atol=1e-6, rtol=1e-5),
    ("contrastive_backward", torch.bfloat16): Tolerance(atol=1e-6, rtol=2.0**-7),
    ("contrastive_sigmoid_backward", torch.float32): Tolerance(atol=1e-6, rtol=1e-5),
    ("contrastive_sigmoid_backward", torch.bfloat16): Tolerance(atol=1e-6, rtol=2.0**-7),
    # For values of size at most 4, as a normalised layer gives, and the default scale. A score is a
    # sum of head_dim products: about sqrt(256) roundings of partial sums of size under 16, so
    # 16 * 16 * 2^-24 = 1.5e-5, at most, and 1 / 4 of it where scores are of usual size. That is the
    # relative error of a weight; out is a mean of values of size 1 by these weights, and lse has
    # the score's error itself, whatever the inputs' dtype. Larger scores: in proportion.
    ("packed_attention", torch.float32): Tolerance(atol=5e-6, rtol=2e-6),
    # A weight is rounded to bfloat16 before the product with values of size at most 4, 2^-9 * 4;
    # then out is rounded, 2^-9 relative, of which the double lets a tie pass.
    ("packed_attention", torch.bfloat16): Tolerance(atol=2.0**-7, rtol=2.0**-8),
    # Gradients are sums over tokens that cancel, so they are divided by the largest of dq, dk and
    # dv before they are compared. dS = P * (dP - delta) has the errors of P (above) and of two sums
    # of head_dim products, each relative to numbers several times dS.
    ("packed_attention_backward", torch.float32): Tolerance(atol=1e-5, rtol=2e-6),
    # P and dS are rounded to bfloat16, delta is of an out that was rounded: each 2^-9 of terms
    # whose sum is the gradient, twice the largest gradient at most; and the result is rounded.
    ("packed_attention_backward", torch.bfloat16): Tolerance(atol=2.0**-7, rtol=2.0**-8),
    # Codes against x / scale: the inverse scale and the product are rounded to float32 (2^-24
    # each), the code to 3 bits, half a unit of which is 2^-4 of a normal value and half of the
    # smallest subnormal, 2^-10, below those. Providers agree with the reference to the bit.
    ("fp8_cast", torch.float8_e4m3fn): Tolerance(atol=2.0**-10, rtol=2.0**-4 + 2.0**-22),
    # The same with 2 bits, and a smallest subnormal of 2^-16.
    ("fp8_cast", torch.float8_e5m2): Tolerance(atol=2.0**-17, rtol=2.0**-3 + 2.0**-22),
    # Scales: one rounded division, 2^-24 relative; they are above the subnormal numbers.
    ("fp8_cast", torch.float32): Tolerance(atol=0.0, rtol=2.0**-24),
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

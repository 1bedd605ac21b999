"""Properties of fp8_cast on random bits: torch's own cast, the transpose, and the group's bound."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import FP8_MAX, Fp8Copies, dequantize, spread
from carillon.kernels.table import resolve

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 140))
BFLOAT16 = SHAPES.flatmap(lambda shape: arrays(np.uint16, shape))
FLOAT32 = SHAPES.flatmap(lambda shape: arrays(np.uint32, shape))
# Half a unit of the mantissa, relative, and half of the smallest subnormal.
HALF_STEPS = {torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}
FORMATS = st.sampled_from(list(FP8_MAX))


def matrix(bits: np.ndarray) -> torch.Tensor:
    if bits.dtype == np.uint16:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits.view(np.float32))


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    nan = got.float().isnan() & wanted.float().isnan()
    return bool(((got.view(torch.uint8) == wanted.view(torch.uint8)) | nan).all())


@settings(max_examples=150, deadline=None)
@given(bits=BFLOAT16 | FLOAT32, exponent=st.floats(-40.0, 40.0), dtype=FORMATS)
def test_codes_of_any_bits_are_torchs(
    bits: np.ndarray, exponent: float, dtype: torch.dtype
) -> None:
    x, scale, limit = matrix(bits), torch.tensor(2.0**exponent), FP8_MAX[dtype]
    copies = Fp8Copies(*resolve("fp8_cast", "cpu")(x, "tensorwise", dtype, scale, column=True))
    wanted = (x.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)
    assert same(copies.row, wanted)
    assert same(copies.column, wanted.t().contiguous())


@settings(max_examples=150, deadline=None)
@given(
    bits=BFLOAT16 | FLOAT32,
    granularity=st.sampled_from(GRANULARITIES),
    dtype=FORMATS,
    power_of_two=st.booleans(),
)
def test_any_bits_at_any_granularity(
    bits: np.ndarray, granularity: str, dtype: torch.dtype, power_of_two: bool
) -> None:
    """The column copy is the row copy of the transpose, and no finite value gets another sign, is
    clipped, or is further off than half a step of its code."""
    x = matrix(bits)
    op = resolve("fp8_cast", "cpu")
    copies = Fp8Copies(*op(x, granularity, dtype, column=True, power_of_two=power_of_two))
    turned = Fp8Copies(*op(x.t(), granularity, dtype, power_of_two=power_of_two))
    assert same(copies.column, turned.row)
    assert torch.equal(copies.column_scale, turned.row_scale)
    finite = x.isfinite()
    back = dequantize(copies.row, copies.row_scale, torch.float64)[finite]
    exact = x.double()[finite]
    steps = spread(copies.row_scale.double(), *x.shape).expand(x.shape)[finite]
    half_step, half_smallest = HALF_STEPS[dtype]
    bound = torch.maximum(exact.abs() * (half_step + 2.0**-22), steps * half_smallest)
    assert ((back - exact).abs() <= bound * (1 + 2.0**-20)).all()
    assert (back * exact.sign() >= 0).all()

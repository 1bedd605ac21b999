"""fp8_cast: every provider against the definition in float64, and to the bit against torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import BLOCK, GRANULARITIES
from carillon.kernels.fp8_cast.reference import FP8_MAX, Fp8Copies, dequantize
from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

# The interpreter computes in numpy, which warns of infinities and NaNs that are meant to be there.
pytestmark = [
    pytest.mark.op("fp8_cast"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

FORMATS = list(FP8_MAX)
INPUTS = [torch.bfloat16, torch.float32]
# One value; one row; one column; blocks that end within the matrix; more than one panel of 256.
SMALL = [(1, 1), (1, 300), (200, 1), (5, 7), (130, 257)]
SHAPES = [*SMALL, (128, 128), (300, 515), (256, 512), (17, 2000)]


def matrix(shape: tuple[int, int], dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    """Normal values whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(shape, generator=generator)
    for size in ((shape[0], 1), (1, shape[1])):
        values *= (torch.randn(size, generator=generator) * spread).exp()
    return values.to(dtype)


def patterns(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Values of random bits: NaNs, infinities, subnormals and all sizes between them."""
    generator = torch.Generator().manual_seed(5)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(bits)
    values = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch.int64)
    return values.to(bits).view(dtype)


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    """Equal bytes and strides; NaNs only have to be NaNs."""
    assert got.dtype == wanted.dtype
    assert got.stride() == wanted.stride()
    got, wanted = got.cpu(), wanted.cpu()
    bits = torch.uint8 if got.element_size() == 1 else torch.int32
    both_nan = got.float().isnan() & wanted.float().isnan()
    equal = (got.contiguous().view(bits) == wanted.contiguous().view(bits)) | both_nan
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ"


def groups(granularity: str, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    height = {"tensorwise": rows, "rowwise": 1, "1x128": 1, "128x128": BLOCK}[granularity]
    width = columns if granularity in ("tensorwise", "rowwise") else BLOCK
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


def assert_defined(
    x_RC: Tensor, codes_RC: Tensor, scale: Tensor, granularity: str, power_of_two: bool
) -> None:
    """The definition, group by group: a scale of amax / fp8_max, codes of x / scale."""
    dtype = codes_RC.dtype
    wanted, got = x_RC.double(), codes_RC.double()
    flat = iter(scale.flatten().tolist())
    bound = TOLERANCES["fp8_cast", torch.float32].rtol
    code_bound = TOLERANCES["fp8_cast", dtype]
    for group in groups(granularity, *x_RC.shape):
        value = next(flat)
        exact = wanted[group].abs().max().item() / FP8_MAX[dtype]
        if power_of_two:
            mantissa, _ = torch.frexp(torch.tensor(value, dtype=torch.float64))
            assert mantissa == 0.5
            assert exact * (1 - bound) <= value < 2 * exact
        else:
            assert abs(value - exact) <= bound * exact
        torch.testing.assert_close(
            got[group], wanted[group] / value, atol=code_bound.atol, rtol=code_bound.rtol
        )
    assert next(flat, None) is None


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_matches_definition(
    provider: str, device: str, dtype: torch.dtype, granularity: str, power_of_two: bool
) -> None:
    for input_dtype in INPUTS:
        x = matrix((130, 257), input_dtype)
        op = resolve("fp8_cast", device, provider)
        given = x.to(device)
        results = op(given, granularity, dtype, column=True, power_of_two=power_of_two)
        copies = Fp8Copies(*(result.cpu() for result in results))
        assert copies.row.is_contiguous()
        assert copies.column.is_contiguous()
        assert_defined(x, copies.row, copies.row_scale, granularity, power_of_two)
        assert_defined(x.t(), copies.column, copies.column_scale, granularity, power_of_two)
        assert copies.amax == x.abs().max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_providers_equal_the_reference_to_the_bit(
    provider: str, device: str, granularity: str
) -> None:
    """And the reference on a GPU that on the CPU."""
    op, reference = resolve("fp8_cast", device, provider), resolve("fp8_cast", "cpu", "reference")
    interpreted = (provider, device) == ("triton", "cpu")
    for number, shape in enumerate(SMALL if interpreted else SHAPES):
        for turn, make in enumerate((matrix, patterns)):
            x = make(shape, INPUTS[number % 2])
            for dtype in FORMATS[turn : turn + 1] if interpreted else FORMATS:
                settings = {"column": number != 2, "power_of_two": number == 3}
                wanted = reference(x, granularity, dtype, **settings)
                results = op(x.to(device), granularity, dtype, **settings)
                for got, want in zip(results, wanted, strict=True):
                    assert_same_bits(got, want)


def all_bfloat16() -> Tensor:
    return torch.arange(2**16).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


def near_every_midpoint(dtype: torch.dtype) -> Tensor:
    """The floats around each boundary between two codes, where rounding can go wrong."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).double()
    finite = codes[codes.isfinite()].unique()
    midpoints = ((finite[1:] + finite[:-1]) / 2).float()
    steps = [torch.full_like(midpoints, float(toward)) for toward in ("-inf", "inf")]
    near = [midpoints, *(torch.nextafter(midpoints, step) for step in steps)]
    return torch.stack([*near, finite[1:].float()])


@pytest.mark.parametrize("dtype", FORMATS)
def test_codes_are_those_of_torchs_own_cast(provider: str, device: str, dtype: torch.dtype) -> None:
    op, limit = resolve("fp8_cast", device, provider), FP8_MAX[dtype]
    one = torch.ones((), device=device)
    for x in (all_bfloat16(), near_every_midpoint(dtype)):
        copies = Fp8Copies(*op(x.to(device), "tensorwise", dtype, one, column=True))
        wanted = x.float().clamp(-limit, limit).to(dtype)
        assert_same_bits(copies.row, wanted)
        assert_same_bits(copies.column, wanted.t().contiguous())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_and_subnormals(provider: str, device: str, granularity: str) -> None:
    op = resolve("fp8_cast", device, provider)
    x = torch.zeros(3, 130, device=device)
    copies = Fp8Copies(*op(x, granularity, torch.float8_e4m3fn, column=True))
    assert copies.amax == 0
    for codes, scale in ((copies.row, copies.row_scale), (copies.column, copies.column_scale)):
        assert (codes.view(torch.uint8) == 0).all()
        assert (scale == 1).all()
    x[1, 2] = 2.0**-140
    copies = Fp8Copies(*op(x, granularity, torch.float8_e4m3fn))
    assert copies.row_scale.min() == 2.0**-126
    assert torch.equal(copies.row.float(), (x * 2.0**126).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_infinities_saturate_and_nan_stays(
    provider: str, device: str, granularity: str, dtype: torch.dtype
) -> None:
    x = matrix((5, 140), torch.float32, spread=0.1).to(device)
    clean = x.clone()
    x[1, 3], x[2, 4], x[3, 5] = float("inf"), float("-inf"), float("nan")
    clean[1, 3] = clean[2, 4] = clean[3, 5] = 0.0
    op, limit = resolve("fp8_cast", device, provider), FP8_MAX[dtype]
    copies = Fp8Copies(*op(x, granularity, dtype, column=True))
    alone = Fp8Copies(*op(clean, granularity, dtype, column=True))
    for codes, other in ((copies.row, alone.row), (copies.column.t(), alone.column.t())):
        values = codes.float()
        assert (values[1, 3], values[2, 4]) == (limit, -limit)
        assert values.isnan().nonzero().tolist() == [[3, 5]]
        values[1, 3] = values[2, 4] = values[3, 5] = 0.0
        assert torch.equal(values, other.float())
    assert torch.equal(copies.row_scale, alone.row_scale)
    assert copies.amax.isnan()
    x[3, 5] = 0.0
    assert op(x, granularity, dtype)[-1] == float("inf")


def test_the_largest_floats_do_not_overflow(provider: str, device: str) -> None:
    x = torch.tensor([[3.4028234e38, -1e38, 1e-38, 0.0]], device=device)
    for dtype in FORMATS:
        copies = Fp8Copies(*resolve("fp8_cast", device, provider)(x, "tensorwise", dtype))
        assert copies.row[0, 0].float() == FP8_MAX[dtype]
        back = dequantize(copies.row, copies.row_scale, torch.float64)
        torch.testing.assert_close(back, x.double(), rtol=0.13, atol=1e33)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(provider: str, device: str, granularity: str, shape: tuple[int, int]) -> None:
    op, reference = resolve("fp8_cast", device, provider), resolve("fp8_cast", "cpu", "reference")
    x, *rest = torch.zeros(shape), granularity, torch.float8_e5m2
    got = op(x.to(device), *rest, column=True)
    for one, wanted in zip(got, reference(x, *rest, column=True), strict=True):
        assert one.shape == wanted.shape
        assert_same_bits(one, wanted)
    assert got[0].shape == shape
    assert got[2].shape == shape[::-1]
    assert got[4] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strided_input(provider: str, device: str, granularity: str) -> None:
    whole = matrix((70, 140), torch.bfloat16).to(device)
    op = resolve("fp8_cast", device, provider)
    for x in (whole[::2, 3:], whole.t(), whole[:1].expand(6, -1)):
        assert not x.is_contiguous()
        arguments = (granularity, torch.float8_e4m3fn)
        wanted = op(x.contiguous(), *arguments, column=True)
        for got, want in zip(op(x, *arguments, column=True), wanted, strict=True):
            assert_same_bits(got, want)

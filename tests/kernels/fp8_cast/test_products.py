"""The three products of a linear layer from single reads, within bounds that are derived."""

import pytest
import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import Fp8Copies, dequantize, spread
from carillon.kernels.table import resolve
from carillon.kernels.tolerances import TOLERANCES

pytestmark = pytest.mark.op("fp8_cast")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# What _scaled_mm takes on the CPU; blockwise scales have a product on Hopper only.
NATIVE_PRODUCTS = ["tensorwise", "rowwise"]


def layer(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K), w (N, K) and dy (M, N), with rows of different size."""
    generator = torch.Generator().manual_seed(3)

    def normal(rows: int, columns: int) -> Tensor:
        size = torch.randn((rows, 1), generator=generator).exp()
        return (torch.randn((rows, columns), generator=generator) * size).bfloat16()

    return normal(m, k), normal(n, k), normal(m, n)


Operand = tuple[Tensor, Tensor, Tensor]  # of R rows and C columns: the values, their codes, scale


def row(x: Tensor, copies: Fp8Copies) -> Operand:
    return x, copies.row, copies.row_scale


def column(x: Tensor, copies: Fp8Copies) -> Operand:
    return x.t(), copies.column, copies.column_scale


def error(operand: Operand) -> Tensor:
    """The most by which each dequantised value may differ from the value."""
    values, codes, scale = operand
    bound = TOLERANCES["fp8_cast", codes.dtype]
    per_value = spread(scale.double(), *codes.shape)
    return bound.atol * per_value + bound.rtol * values.double().abs()


def multiply(a: Operand, b: Operand, granularity: str) -> tuple[Tensor, Tensor]:
    """a @ b.T of the codes by torch._scaled_mm, and how far it may be from the exact sum."""
    b_scale = b[2] if granularity == "tensorwise" else b[2].t()
    on_gpu = a[1].is_cuda
    # On a GPU it gives bfloat16 where the scales are many, and rounds once more.
    dtype = torch.bfloat16 if on_gpu and granularity != "tensorwise" else torch.float32
    got = torch._scaled_mm(a[1], b[1].t(), a[2], b_scale, out_dtype=dtype).double()
    got_a, got_b = (dequantize(codes, scale, torch.float64) for _, codes, scale in (a, b))
    # Float32 sums of C products in any order, then two scales: (C + 3) roundings of 2^-24 of at
    # most the sum of magnitudes. A tensor core adds 32 products at a time, each cut off 13 bits
    # below the largest of them (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    rounding = 32 * 2.0**-13 if on_gpu else (a[1].shape[1] + 3) * 2.0**-24
    bound = rounding * (got_a.abs() @ got_b.abs().t())
    if dtype == torch.bfloat16:
        bound = bound + 2.0**-9 * got.abs()
    assert ((got - got_a @ got_b.t()).abs() <= bound).all()
    return got, bound


def assert_product(a: Operand, b: Operand, granularity: str) -> None:
    """a @ b.T against float64, once of the values and once of what the codes stand for."""
    exact_a, exact_b = a[0].double(), b[0].double()
    if granularity in NATIVE_PRODUCTS:
        got, rounding = multiply(a, b, granularity)
    else:
        got_a, got_b = (dequantize(codes, scale, torch.float64) for _, codes, scale in (a, b))
        got, rounding = got_a @ got_b.t(), got_a.new_zeros(())
    error_a, error_b = error(a), error(b)
    bound = error_a @ exact_b.abs().t() + (exact_a.abs() + error_a) @ error_b.t() + rounding
    assert ((got - exact_a @ exact_b.t()).abs() <= bound).all()
    assert got.norm() > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_products_of_a_linear_layer(
    provider: str, device: str, granularity: str, power_of_two: bool
) -> None:
    values = [value.to(device) for value in layer(m=144, n=80, k=160)]
    op = resolve("fp8_cast", device, provider)
    copies = [
        Fp8Copies(*op(value, granularity, dtype, column=True, power_of_two=power_of_two))
        for value, dtype in zip(values, (E4M3, E4M3, E5M2), strict=True)
    ]
    (x, w, dy), (of_x, of_w, of_dy) = values, copies
    assert_product(row(x, of_x), row(w, of_w), granularity)  # y = x @ w.T
    assert_product(row(dy, of_dy), column(w, of_w), granularity)  # dx = dy @ w
    assert_product(column(dy, of_dy), column(x, of_x), granularity)  # dw = dy.T @ x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch multiplies them on a GPU only")
@pytest.mark.parametrize(
    ("of_x", "of_w"), [("1x128", "1x128"), ("1x128", "128x128"), ("128x128", "1x128")]
)
def test_blockwise_products_on_a_gpu(of_x: str, of_w: str) -> None:
    x, w, _ = (value.cuda() for value in layer(m=256, n=384, k=512))
    op = resolve("fp8_cast", "cuda")
    a = row(x, Fp8Copies(*op(x, of_x, E4M3)))
    b = row(w, Fp8Copies(*op(w, of_w, E4M3)))
    got, _ = multiply(a, b, of_x)
    assert got.norm() > 0


@pytest.mark.parametrize("granularity", NATIVE_PRODUCTS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (130, 97, 272)])
def test_products_of_odd_sizes(granularity: str, m: int, n: int, k: int) -> None:
    x, w, _ = layer(m, n, k)
    op = resolve("fp8_cast", "cpu")
    copies = [Fp8Copies(*op(value, granularity, E4M3)) for value in (x, w)]
    assert_product(row(x, copies[0]), row(w, copies[1]), granularity)


def test_finer_groups_are_nearer() -> None:
    """What the granularities are for: an outlier spoils its own group only."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((256, 512), generator=generator) * 1e-3
    x[7, 9] = 1e3
    left = {}
    for granularity in GRANULARITIES:
        codes, scale, *_ = resolve("fp8_cast", "cpu")(x, granularity, E4M3)
        spoilt = dequantize(codes, scale) - x
        spoilt[7, 9] = 0
        left[granularity] = spoilt.norm() / x[:7].norm()
    assert left["1x128"] < left["rowwise"] < left["tensorwise"]
    assert left["1x128"] < left["128x128"] < left["tensorwise"]
    assert left["tensorwise"] > 0.9  # everything but the outlier is lost

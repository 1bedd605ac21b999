"""Definition of fp8_cast: a matrix to 8-bit floats with scales, in plain torch.

Shape suffixes: M rows, K columns of the matrix; R rows, C columns of either copy.
The scale is the one that gives the value back, code * scale, as torch._scaled_mm takes it:

    amax    = the largest finite |x| of the group            (float32; exact)
    scale   = max(amax / fp8_max, 2^-126), 1 where amax = 0  (one division)
    inverse = 1 / scale                                      (one division)
    code    = round to nearest even of clamp(x * inverse, -fp8_max, fp8_max)

Each line is one IEEE float32 operation, so providers agree to the bit. A group of zeros gives
zeros. The floor keeps `inverse` finite where amax is subnormal. Left out: stochastic rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import BLOCK, GRANULARITIES, new_scale, num_blocks
from carillon.kernels.roofline import Cost

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
INPUT_DTYPES = (torch.bfloat16, torch.float32)
MIN_SCALE = 2.0**-126


class Fp8Copies(NamedTuple):
    """The copies (M, K) and (K, M) of one matrix, their scales, and the largest magnitude.

    Where the column copy is not asked for, it and its scale have the shape (0, 0).
    """

    row: Tensor
    row_scale: Tensor
    column: Tensor
    column_scale: Tensor
    amax: Tensor


def fp8_cast(
    x_MK: Tensor,
    granularity: str,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    column: bool = False,
    power_of_two: bool = False,
    check_finite: bool = False,
) -> Fp8Copies:
    """Quantises x, and its transpose where `column` asks for it.

    With w of a linear layer cast alike, the three products are
    `_scaled_mm(x.row, w.row.t(), x.row_scale, w.row_scale.t())` for the output,
    `_scaled_mm(dy.row, w.column.t(), dy.row_scale, w.column_scale.t())` for dx, and
    `_scaled_mm(dy.column, x.column.t(), dy.column_scale, x.column_scale.t())` for dw
    (tensorwise scales are `()` and need no `.t()`, which leaves them as they are).

    Shapes: x (M, K) bfloat16 or float32, any strides (made contiguous first) -> row (M, K), column
    (K, M), both contiguous; the scales as `layout.py` says; amax ().
    Granularity: "tensorwise"; "rowwise" (each row of each copy); "1x128" (128 columns of a row of
    each copy: the column copy's groups are 128 rows of a column of x); "128x128". Blocks at the
    edges are shorter. The column copy is always the row copy of x transposed.
    `power_of_two` rounds each scale up to a power of two. `scale`, one float32 value, is used for
    "tensorwise" instead of the one computed: delayed scaling, where all is one read of x
    (`amax_history.py`). Without it "tensorwise" and "rowwise" must know amax before the first code,
    which takes a second read; the blockwise ones take one.
    `amax` is max |x|, of all of x: inf or NaN where x has one, 0 where x is empty.
    Values: saturates, and an infinity becomes the largest code, with its sign; NaN stays NaN (the
    sign of a NaN is not defined) and neither has a part in a scale. Computed in float32,
    deterministic, and to the bit the same in every provider, except under
    torch.set_flush_denormal. No gradient: the ops that multiply the copies define theirs.
    `check_finite` reads amax and scale back, which waits for a GPU.

    Raises:
        ValueError: x of another dtype or not a matrix, an unknown granularity or dtype, a scale
            with another granularity than "tensorwise", with power_of_two, on another device than x
            or not one float32 value; with check_finite, x with NaN or infinity, or a scale that is
            not positive and finite.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3 for the blocks and the powers of two;
    Micikevicius et al. (arXiv 2209.05433) for the formats.
    """
    check(x_MK, granularity, dtype, scale, power_of_two)
    x_MK = x_MK.detach()
    amax = largest(x_MK)
    if check_finite:
        check_values(amax, scale)
    row, row_scale = _cast(x_MK, granularity, dtype, scale, power_of_two)
    if not column:
        nothing = row.new_empty((0, 0))
        return Fp8Copies(row, row_scale, nothing, nothing.to(torch.float32), amax)
    column_KM, column_scale = _cast(x_MK.t(), granularity, dtype, scale, power_of_two)
    return Fp8Copies(row, row_scale, column_KM, column_scale, amax)


def _cast(
    x_RC: Tensor, granularity: str, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """The codes of x and their scales, in the order of memory that `layout.py` says."""
    x_RC = x_RC.to(torch.float32).contiguous()
    scales = new_scale(x_RC, granularity, *x_RC.shape)
    if scale is None:
        scales.copy_(scale_from_amax(group_amax(x_RC, granularity), dtype, power_of_two))
    else:
        scales.copy_(scale.detach().reshape(()))
    inverse_RC = spread(1.0 / scales, *x_RC.shape)
    limit = FP8_MAX[dtype]
    return (x_RC * inverse_RC).clamp(-limit, limit).to(dtype), scales


def largest(x: Tensor) -> Tensor:
    """max |x| in float32: NaN where x has a NaN, 0 where x is empty."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    return x.abs().amax().to(torch.float32)


def group_amax(x_RC: Tensor, granularity: str) -> Tensor:
    """The largest finite magnitude of each group, in the shape of the group's scales."""
    finite_RC = torch.where(x_RC.isfinite(), x_RC.abs(), 0.0)
    if granularity == "tensorwise":
        return largest(finite_RC)
    num_rows, num_columns = finite_RC.shape
    if granularity == "rowwise":
        return torch.nn.functional.pad(finite_RC, (0, 1)).amax(1, keepdim=True)
    columns = num_blocks(num_columns)
    padded = torch.nn.functional.pad(finite_RC, (0, columns * BLOCK - num_columns))
    amax_RB = padded.reshape(num_rows, columns, BLOCK).amax(2)
    if granularity == "1x128":
        return amax_RB
    rows = num_blocks(num_rows)
    padded = torch.nn.functional.pad(amax_RB, (0, 0, 0, rows * BLOCK - num_rows))
    return padded.reshape(rows, BLOCK, columns).amax(1)


def scale_from_amax(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """amax / fp8_max, at least 2^-126, 1 where amax is 0; a power of two is never below it."""
    scale = (amax / FP8_MAX[dtype]).clamp_min(MIN_SCALE)
    if power_of_two:  # adding all ones carries into the exponent unless the mantissa is 0
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)


def spread(scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """One scale per value, in a shape that broadcasts to (num_rows, num_columns)."""
    if scale.dim() == 0:
        return scale
    if scale.shape[0] != num_rows:
        scale = scale.repeat_interleave(BLOCK, 0)[:num_rows]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(BLOCK, 1)[:, :num_columns]
    return scale


def dequantize(codes_RC: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gives the values back, code * scale, of either copy: for tests, and where no product exists.

    Shapes: codes (R, C) in fp8, scale as `layout.py` says -> (R, C) in `dtype`, computed in it.
    """
    return codes_RC.to(dtype) * spread(scale.to(dtype), *codes_RC.shape)


def cost(num_rows: int, num_columns: int, input_size_bytes: int, column: bool) -> Cost:
    """One read of x and one write of each copy; the scales are small beside them."""
    copies = 2 if column else 1
    return Cost(flops=0.0, size_bytes=float(num_rows * num_columns * (input_size_bytes + copies)))


def check(
    x_MK: Tensor, granularity: str, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool
) -> None:
    """Raises ValueError, saying what was given and what is allowed."""
    if x_MK.dtype not in INPUT_DTYPES:
        raise ValueError(f"fp8_cast: x must be bfloat16 or float32, got {x_MK.dtype}")
    if x_MK.dim() != 2:
        raise ValueError(f"fp8_cast: x must have the shape (M, K), got {tuple(x_MK.shape)}")
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"fp8_cast: granularity must be one of {', '.join(GRANULARITIES)}, got '{granularity}'"
        )
    if dtype not in FP8_MAX:
        raise ValueError(f"fp8_cast: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")
    if scale is None:
        return
    if granularity != "tensorwise":
        raise ValueError(f"fp8_cast: scale goes with tensorwise granularity, got '{granularity}'")
    if power_of_two:
        raise ValueError("fp8_cast: power_of_two rounds computed scales, and scale is given")
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x_MK.device:
        raise ValueError(
            f"fp8_cast: scale must be one float32 value on the device of x, {x_MK.device}, "
            f"got {scale.numel()} of {scale.dtype} on {scale.device}"
        )


def check_values(amax: Tensor, scale: Tensor | None) -> None:
    """Raises ValueError for NaN or infinity in x, and for a scale that cannot divide."""
    if not bool(amax.isfinite()):
        raise ValueError(f"fp8_cast: x must be finite, its largest magnitude is {amax.item()}")
    if scale is not None and not (bool(scale.isfinite().all()) and bool((scale > 0).all())):
        raise ValueError(f"fp8_cast: scale must be positive and finite, got {scale.item()}")

"""fp8_cast in Triton: a program reads one 128 x 128 tile and writes both copies of it.

The tile stays in registers from the read to the second write; the transpose goes through shared
memory. Blockwise scales and a given scale are known within the tile: one pass. Tensorwise and
rowwise scales take a first pass that leaves amaxes by integer atomics (the bits of magnitudes order
as the magnitudes do), so they do not depend on the order of programs.
The processor's own conversion (cvt.rn.satfinite) rounds; the interpreter's does not round to
nearest even, so there the same result comes from integer arithmetic.
Status: runs in the interpreter and compiles for sm_90; has not run on a GPU.
Left out: rows short enough to stay in shared memory, which would save rowwise its second read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from carillon.kernels.compile_report import CompileCase
from carillon.kernels.fp8_cast.layout import BLOCK, GRANULARITIES
from carillon.kernels.fp8_cast.reference import FP8_MAX, check, check_values
from carillon.kernels.fp8_cast.registration import Outputs, new_outputs
from carillon.kernels.table import interprets_triton

_NUM_WARPS = 8
_STEP = 32
_TENSORWISE = tl.constexpr(GRANULARITIES.index("tensorwise"))
_ROWWISE = tl.constexpr(GRANULARITIES.index("rowwise"))
_1X128 = tl.constexpr(GRANULARITIES.index("1x128"))
_128X128 = tl.constexpr(GRANULARITIES.index("128x128"))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _scale(amax_bits, limit: tl.constexpr, power_of_two: tl.constexpr):
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, limit, tl.float32)), 2.0**-126)
    if power_of_two:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & _INFINITY
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(amax_bits == 0, 1.0, scale)


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _encode(value, limit: tl.constexpr, hardware: tl.constexpr):
    value = tl.clamp(value, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    e4m3: tl.constexpr = limit == 448.0
    if hardware:
        if e4m3:
            code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        shift: tl.constexpr = 20 if e4m3 else 21
        rebias: tl.constexpr = (120 if e4m3 else 112) << 23
        min_normal: tl.constexpr = 2.0**-6 if e4m3 else 2.0**-14
        # Its last bit is worth the smallest subnormal, so the addition rounds to those.
        magic: tl.constexpr = 2.0**14 if e4m3 else 2.0**7
        magic_bits: tl.constexpr = (141 if e4m3 else 134) << 23
        bits = value.to(tl.int32, bitcast=True)
        size_bits = bits & 0x7FFFFFFF
        size = size_bits.to(tl.float32, bitcast=True)
        odd = (size_bits >> shift) & 1
        normal = (size_bits - rebias + (1 << (shift - 1)) - 1 + odd) >> shift
        subnormal = (size + magic).to(tl.int32, bitcast=True) - magic_bits
        code = tl.where(size < min_normal, subnormal, normal)
        code = tl.where(size_bits > _INFINITY, 0x7F, code)
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def _load(x_ptr, m, k, pid_m, first_k, block: tl.constexpr, step: tl.constexpr):
    """The bits, in float32, of a tile of `block` rows and `step` columns; zeros outside.

    32-bit offsets from a 64-bit start.
    """
    rows = tl.arange(0, block)
    columns = tl.arange(0, step)
    start = x_ptr + pid_m.to(tl.int64) * block * k + first_k
    inside = (rows < m - pid_m * block)[:, None] & (columns < k - first_k)[None, :]
    x = tl.load(start + rows[:, None] * k + columns[None, :], mask=inside, other=0)
    if x.dtype == tl.int16:  # a bfloat16: the upper half of a float
        x = x.to(tl.int32) << 16
    return x


@triton.jit
def _magnitudes(x_bits):
    """Bits of |x|, and the same with 0 for what is not finite."""
    bits = x_bits & 0x7FFFFFFF
    return bits, tl.where(bits < _INFINITY, bits, 0)


@triton.jit
def find_amax(
    x_ptr, amax_ptr, group_ptr, m, k,
    granularity: tl.constexpr, column: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Raises amax (of all values) and the finite amaxes: one; or m of rows and k of columns."""
    tiles = tl.cdiv(k, block)
    pid_m = tl.program_id(0) // tiles
    pid_k = tl.program_id(0) % tiles
    every, finite = _magnitudes(_load(x_ptr, m, k, pid_m, pid_k * block, block, block))
    tl.atomic_max(amax_ptr, tl.max(tl.max(every, 1), 0), sem="relaxed")
    row_amax = tl.max(finite, 1)
    if granularity == _TENSORWISE:
        tl.atomic_max(group_ptr, tl.max(row_amax, 0), sem="relaxed")
    else:
        rows = pid_m * block + tl.arange(0, block)
        tl.atomic_max(group_ptr + rows, row_amax, mask=rows < m, sem="relaxed")
        if column:
            columns = pid_k * block + tl.arange(0, block)
            group_ptr += m
            tl.atomic_max(group_ptr + columns, tl.max(finite, 0), mask=columns < k, sem="relaxed")


@triton.jit
def cast_tiles(
    x_ptr, row_ptr, column_ptr, row_scale_ptr, column_scale_ptr, amax_ptr, group_ptr, inverse_ptr,
    given_ptr, m, k, row_stride, row_block_stride, column_stride, column_block_stride,
    granularity: tl.constexpr, limit: tl.constexpr, column: tl.constexpr,
    power_of_two: tl.constexpr, given: tl.constexpr, hardware: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """Writes one tile of the copies, and the scales that are its own to write.

    group_ptr has what find_amax left. Blockwise and given scales do without find_amax, and this
    kernel raises amax; for 1x128 group_ptr takes the amaxes of columns, k for each row of tiles.
    inverse_ptr takes the inverse scales of columns: they are divided once, by one thread each, and
    not by every thread that holds a part of the column.
    """
    pid_m = tl.program_id(0) // tl.cdiv(k, block)
    pid_k = tl.program_id(0) % tl.cdiv(k, block)
    tile_rows = tl.arange(0, block)
    tile_columns = tl.arange(0, step)
    rows = pid_m * block + tile_rows
    row_in = rows < m
    blockwise: tl.constexpr = granularity == _1X128 or granularity == _128X128
    largest = tl.zeros((block,), tl.int32)
    row_amax = tl.zeros((block,), tl.int32)
    if blockwise:
        for first in tl.static_range(0, block, step):
            x_bits = _load(x_ptr, m, k, pid_m, pid_k * block + first, block, step)
            every, finite = _magnitudes(x_bits)
            largest = tl.maximum(largest, tl.max(every, 1))
            row_amax = tl.maximum(row_amax, tl.max(finite, 1))
            if column and granularity == _1X128:
                columns = pid_k * block + first + tile_columns
                amax_at = group_ptr + pid_m.to(tl.int64) * k + columns
                tl.store(amax_at, tl.max(finite, 0), mask=columns < k)

    if granularity == _TENSORWISE:
        scale = tl.load(given_ptr) if given else _scale(tl.load(group_ptr), limit, power_of_two)
        if tl.program_id(0) == 0:
            tl.store(row_scale_ptr, scale)
            if column:
                tl.store(column_scale_ptr, scale)
        row_inverse = _inverse(scale)
    elif granularity == _128X128:
        scale = _scale(tl.max(row_amax, 0), limit, power_of_two)
        tl.store(row_scale_ptr + pid_m * row_stride + pid_k * row_block_stride, scale)
        if column:
            scale_at = pid_k * column_stride + pid_m * column_block_stride
            tl.store(column_scale_ptr + scale_at, scale)
        row_inverse = _inverse(scale)
    elif granularity == _ROWWISE:
        row_scale = _scale(tl.load(group_ptr + rows, mask=row_in, other=0), limit, power_of_two)
        tl.store(row_scale_ptr + rows, row_scale, mask=row_in & (pid_k == 0))
        row_inverse = _inverse(row_scale)[:, None]
    else:
        row_scale = _scale(row_amax, limit, power_of_two)
        scale_at = rows * row_stride + pid_k.to(tl.int64) * row_block_stride
        tl.store(row_scale_ptr + scale_at, row_scale, mask=row_in)
        row_inverse = _inverse(row_scale)[:, None]

    tensorlike: tl.constexpr = granularity == _TENSORWISE or granularity == _128X128
    own_columns: tl.constexpr = column and not tensorlike
    if own_columns:
        all_columns = pid_k * block + tl.arange(0, block)
        all_in = all_columns < k
        if granularity == _1X128:
            tl.debug_barrier()
            group_ptr += pid_m.to(tl.int64) * k
            inverse_ptr += pid_m.to(tl.int64) * k
        else:
            group_ptr += m
        amax = tl.load(group_ptr + all_columns, mask=all_in, other=0)
        column_scale = _scale(amax, limit, power_of_two)
        scale_at = all_columns * column_stride + pid_m.to(tl.int64) * column_block_stride
        tl.store(column_scale_ptr + scale_at, column_scale, mask=all_in)
        tl.store(inverse_ptr + all_columns, _inverse(column_scale), mask=all_in)
        tl.debug_barrier()

    for first in tl.static_range(0, block, step):
        x_bits = _load(x_ptr, m, k, pid_m, pid_k * block + first, block, step)
        value = x_bits.to(tl.float32, bitcast=True)
        columns = pid_k * block + first + tile_columns
        column_in = columns < k
        row_code = _encode(value * row_inverse, limit, hardware)
        start = row_ptr + pid_m.to(tl.int64) * block * k + pid_k * block + first
        inside = row_in[:, None] & column_in[None, :]
        tl.store(start + tile_rows[:, None] * k + tile_columns[None, :], row_code, mask=inside)
        if given:
            largest = tl.maximum(largest, tl.max(x_bits & 0x7FFFFFFF, 1))
        if column:
            column_code = row_code
            if own_columns:
                column_inverse = tl.load(inverse_ptr + columns, mask=column_in, other=0.0)
                column_code = _encode(value * column_inverse[None, :], limit, hardware)
            start = column_ptr + (pid_k * block + first).to(tl.int64) * m + pid_m * block
            inside = column_in[:, None] & row_in[None, :]
            code_at = tile_columns[:, None] * m + tile_rows[None, :]
            tl.store(start + code_at, tl.trans(column_code), mask=inside)
    if given or blockwise:
        tl.atomic_max(amax_ptr, tl.max(largest, 0), sem="relaxed")


def fp8_cast(
    x_MK: Tensor,
    granularity: str,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    column: bool = False,
    power_of_two: bool = False,
    check_finite: bool = False,
) -> Outputs:
    check(x_MK, granularity, dtype, scale, power_of_two)
    x_MK = x_MK.detach().contiguous()
    row_MK, row_scale, column_KM, column_scale, _ = new_outputs(x_MK, granularity, dtype, column)
    amax_bits = x_MK.new_zeros((), dtype=torch.int32)
    amax = amax_bits.view(torch.float32)
    if x_MK.numel() == 0:
        for each in (row_scale, column_scale):
            each.fill_(1.0) if scale is None else each.copy_(scale.reshape(()))
    else:
        outputs = (row_MK, column_KM, row_scale, column_scale)
        _launch(x_MK, granularity, dtype, scale, column, power_of_two, outputs, amax_bits)
    if check_finite:
        check_values(amax, scale)
    return row_MK, row_scale, column_KM, column_scale, amax


def _launch(
    x_MK: Tensor,
    granularity: str,
    dtype: torch.dtype,
    scale: Tensor | None,
    column: bool,
    power_of_two: bool,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    amax_bits: Tensor,
) -> None:
    m, k = x_MK.shape
    row_MK, column_KM, row_scale, column_scale = outputs
    grid = (triton.cdiv(m, BLOCK) * triton.cdiv(k, BLOCK),)
    x_bits = x_MK.view(torch.int16 if x_MK.dtype == torch.bfloat16 else torch.int32)
    settings: dict[str, Any] = {
        "granularity": GRANULARITIES.index(granularity),
        "column": column,
        "block": BLOCK,
        "num_warps": _NUM_WARPS,
    }
    groups, inverses = amax_bits, row_scale
    if granularity == "rowwise" or (granularity == "tensorwise" and scale is None):
        groups = x_MK.new_zeros((m + k if granularity == "rowwise" else 1,), dtype=torch.int32)
        find_amax[grid](x_bits, amax_bits, groups, m, k, **settings)
    if column and granularity in ("rowwise", "1x128"):
        inverses = torch.empty_like(column_scale)
        if granularity == "1x128":
            groups = torch.empty_like(inverses, dtype=torch.int32)
    strides = [*_strides(row_scale), *_strides(column_scale)]
    if granularity == "rowwise":  # one scale a column, and no blocks
        strides[3] = 0
    cast_tiles[grid](
        x_bits, row_MK.view(torch.uint8), column_KM.view(torch.uint8), row_scale, column_scale,
        amax_bits, groups, inverses, row_scale if scale is None else scale, m, k, *strides,
        limit=FP8_MAX[dtype], power_of_two=power_of_two, given=scale is not None,
        hardware=not interprets_triton(), step=_STEP, **settings,
    )  # fmt: skip


def _strides(scale: Tensor) -> tuple[int, ...]:
    return scale.stride() if scale.dim() == 2 else (0, 0)


IMPLEMENTS = {"fp8_cast": fp8_cast}


def compile_cases() -> list[CompileCase]:
    """Both copies at each granularity, of bf16 into e4m3; fp32 and e5m2 where they are heaviest."""
    cases = [
        _cast_case("i16", granularity, torch.float8_e4m3fn, given=False)
        for granularity in GRANULARITIES
    ]
    cases.append(_cast_case("i16", "tensorwise", torch.float8_e4m3fn, given=True))
    cases.append(_cast_case("i32", "1x128", torch.float8_e5m2, given=False))
    return cases + [_amax_case("i16", granularity) for granularity in ("tensorwise", "rowwise")]


def _cast_case(bits: str, granularity: str, dtype: torch.dtype, given: bool) -> CompileCase:
    pointers = {"x_ptr": f"*{bits}", "row_ptr": "*u8", "column_ptr": "*u8"}
    scales = ("row_scale_ptr", "column_scale_ptr", "inverse_ptr", "given_ptr")
    pointers |= dict.fromkeys(scales, "*fp32")
    pointers |= dict.fromkeys(("amax_ptr", "group_ptr"), "*i32")
    sizes = ("m", "k", "row_stride", "row_block_stride", "column_stride", "column_block_stride")
    constants = {
        "granularity": GRANULARITIES.index(granularity),
        "limit": FP8_MAX[dtype],
        "column": True,
        "power_of_two": False,
        "given": given,
        "hardware": True,
        "step": _STEP,
        "block": BLOCK,
    }
    name = f"cast_tiles {granularity}{' given' if given else ''} {bits} {str(dtype)[13:]}"
    signature = pointers | dict.fromkeys(sizes, "i32")
    divisible = (*pointers, "m", "k")
    return CompileCase(
        name, cast_tiles, signature, constants, num_warps=_NUM_WARPS, divisible=divisible
    )


def _amax_case(bits: str, granularity: str) -> CompileCase:
    signature = {"x_ptr": f"*{bits}", "amax_ptr": "*i32", "group_ptr": "*i32"}
    constants = {
        "granularity": GRANULARITIES.index(granularity),
        "column": True,
        "block": BLOCK,
    }
    signature |= {"m": "i32", "k": "i32"}
    return CompileCase(
        f"find_amax {granularity} {bits}",
        find_amax,
        signature,
        constants,
        num_warps=_NUM_WARPS,
        divisible=tuple(signature),
    )

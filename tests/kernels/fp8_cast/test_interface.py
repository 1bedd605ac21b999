"""fp8_cast: bad arguments, memory layout, torch.compile, threads, gradients, the GPU's rounding."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import Fp8Copies
from carillon.kernels.table import load_native, resolve

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.op("fp8_cast")
E4M3 = torch.float8_e4m3fn
X = torch.ones(4, 8)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X.double(), "rowwise", E4M3), {}, "x must be bfloat16 or float32, got"),
        ((X.half(), "rowwise", E4M3), {}, "x must be bfloat16 or float32, got"),
        ((X[0], "rowwise", E4M3), {}, r"x must have the shape \(M, K\), got"),
        ((X[None], "rowwise", E4M3), {}, r"x must have the shape \(M, K\), got"),
        ((X, "columnwise", E4M3), {}, "one of tensorwise, .*128x128, got 'columnwise'"),
        ((X, "rowwise", torch.bfloat16), {}, "float8_e4m3fn or float8_e5m2, got"),
        ((X, "rowwise", torch.float8_e4m3fnuz), {}, "float8_e4m3fn or float8_e5m2, got"),
        ((X, "rowwise", E4M3, ONE), {}, "goes with tensorwise granularity, got 'rowwise'"),
        ((X, "tensorwise", E4M3, ONE), {"power_of_two": True}, "and scale is given"),
        ((X, "tensorwise", E4M3, torch.ones(2)), {}, "one float32 value .*, got 2 of"),
        ((X, "tensorwise", E4M3, ONE.double()), {}, "one float32 value .*, got 1 of"),
        ((X, "tensorwise", E4M3, torch.ones(0)), {}, "one float32 value .*, got 0 of"),
        ((X, "tensorwise", E4M3, ONE.to("meta")), {}, "on the device of x, .*, got .* on meta"),
        ((X / 0, "1x128", E4M3), {"check_finite": True}, "x must be finite, .* is inf"),
        ((X - float("nan"), "1x128", E4M3), {"check_finite": True}, "must be finite, .* is nan"),
        ((X, "tensorwise", E4M3, ONE * 0), {"check_finite": True}, "positive and finite, got 0"),
        ((X, "tensorwise", E4M3, -ONE), {"check_finite": True}, "positive and finite, got -1"),
        ((X, "tensorwise", E4M3, ONE / 0), {"check_finite": True}, "and finite, got inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_bad_arguments_name_what_is_allowed(
    provider: str,
    device: str,
    arguments: tuple[Any, ...],
    settings: dict[str, bool],
    message: str,
) -> None:
    given = [x.to(device) if isinstance(x, Tensor) and x.device.type == "cpu" else x
             for x in arguments]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        resolve("fp8_cast", device, provider)(*given, **settings)


def test_finite_values_pass_the_check(provider: str, device: str) -> None:
    op = resolve("fp8_cast", device, provider)
    x, one = X.to(device) * -3, ONE.to(device)
    copies = Fp8Copies(*op(x, "tensorwise", E4M3, one, check_finite=True))
    assert copies.amax == 3
    assert (copies.row.float() == -3).all()


def test_scales_stand_as_scaled_mm_wants_them(provider: str, device: str) -> None:
    """300 rows and 700 columns: 3 by 6 blocks, whose rows are padded to 8, and columns to 4."""
    op = resolve("fp8_cast", device, provider)
    x = torch.ones(300, 700, device=device)
    wanted = {
        "tensorwise": [((), ()), ((), ())],
        "rowwise": [((300, 1), (1, 1)), ((700, 1), (1, 1))],
        "1x128": [((300, 6), (1, 300)), ((700, 3), (1, 700))],
        "128x128": [((3, 6), (8, 1)), ((6, 3), (4, 1))],
    }
    for granularity, layouts in wanted.items():
        copies = Fp8Copies(*op(x, granularity, E4M3, column=True))
        for scale, layout in zip((copies.row_scale, copies.column_scale), layouts, strict=True):
            assert (scale.shape, scale.stride()) == layout
    padding = copies.row_scale.as_strided((3, 2), (8, 1), 6)
    assert (padding == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("shape", [(150, 140), (0, 4)])
def test_opcheck(granularity: str, column: bool, shape: tuple[int, int]) -> None:
    load_native()
    op = torch.ops.carillon.fp8_cast.default
    x = torch.randn(shape, requires_grad=shape[0] > 0 and column)
    torch.library.opcheck(op, (x, granularity, E4M3), {"column": column})
    if granularity == "tensorwise":
        torch.library.opcheck(op, (x, granularity, E4M3, torch.full((), 0.1)), {"column": column})


def test_opcheck_of_triton() -> None:
    resolve("fp8_cast", "cpu", "triton")
    op = torch.ops.carillon_triton.fp8_cast.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (X, "1x128", E4M3), {"column": True}, test_utils=tests)


def product(op: Callable[..., Any], x: Tensor, w: Tensor) -> Tensor:
    row, row_scale, *_ = op(x, "rowwise", E4M3)
    w_row, w_scale, *_ = op(w, "rowwise", E4M3)
    return torch._scaled_mm(row, w_row.t(), row_scale, w_scale.t(), out_dtype=torch.float32)


def test_compiles_without_a_graph_break() -> None:
    op = resolve("fp8_cast", "cpu")
    x, w = torch.randn(32, 64), torch.randn(48, 64)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(op, x, w), product(op, x, w))


def test_copies_ask_for_no_gradient(provider: str, device: str) -> None:
    x = torch.randn(4, 4, device=device, requires_grad=True)
    scale = torch.ones((), device=device, requires_grad=True)
    outputs = resolve("fp8_cast", device, provider)(x, "tensorwise", E4M3, scale, column=True)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_and_two_threads_agree_to_the_bit(granularity: str) -> None:
    x = torch.randn(700, 900).bfloat16()
    op = resolve("fp8_cast", "cpu", "native")
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(op(x, granularity, torch.float8_e5m2, column=True))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.float(), two.float())


def test_the_gpu_rounds_by_its_own_conversion() -> None:
    """What the interpreter computes by integers is one saturating, rounding instruction there."""
    program = """
import sys
from carillon.kernels.compile_report import compile_case
from carillon.kernels.fp8_cast.triton_impl import compile_cases
cases = compile_cases()
e4m3 = next(case for case in cases if case.name.endswith("e4m3fn"))
e5m2 = next(case for case in cases if case.name.endswith("e5m2"))
for case, instruction in ((e4m3, "e4m3x2"), (e5m2, "e5m2x2")):
    ptx = compile_case(case).asm["ptx"]
    assert f"cvt.rn.satfinite.{instruction}.f32" in ptx, case.name
    assert ".ftz" not in ptx, "subnormal scales and products would be lost"
    assert "div.rn.f32" in ptx, case.name
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

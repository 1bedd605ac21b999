"""Three things that Triton 3.6's interpreter gets wrong are put right here, each to go with a
Triton that does it itself. (tests/conftest.py chooses the interpreter.)"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carillon.kernels.table import load_native

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # the tests that need Triton say so themselves
    interpreter = None


def _let_loops_run_to_computed_bounds() -> None:
    """NumPy 2.4 refuses int() of an array of one element, which a loop's bound may be."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _round_to_bfloat16() -> None:
    """It cuts the last bits off, where the processor rounds to nearest even."""
    original = interpreter._convert_float

    def patched(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16) and rounding is None:
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return original(values, source, target, rounding)

    interpreter._convert_float = patched


def _multiply_bfloat16() -> None:
    """It multiplies the bits of bfloat16 as integers."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def as_float32(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def patched(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, as_float32(a), as_float32(b), *rest)

    builder.create_dot = patched


if interpreter is not None:
    _let_loops_run_to_computed_bounds()
    _round_to_bfloat16()
    _multiply_bfloat16()


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the CPU provider by each instruction set that the processor has, as others would."""
    load_native()
    limit = torch.ops.carillon.limit_instruction_set
    try:
        if limit(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        limit("avx512_bf16")


@pytest.fixture
def run_native_test(tmp_path: Path) -> Callable[[Path], None]:
    """Compiles a test in C++ that includes headers of csrc/, with sanitizers, and runs it."""

    def run(source: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        program = tmp_path / source.stem
        compile_command = [
            *("c++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            *(f"-I{root / 'csrc'}", f"-I{root / 'tests' / 'kernels'}"),
            *(str(source), "-o", str(program)),
        ]
        for command in (compile_command, [str(program)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    return run

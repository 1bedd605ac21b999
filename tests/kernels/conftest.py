"""Which provider of an op a test runs by, and on which device: see `pytest_generate_tests`.

And three things that Triton 3.6's interpreter gets wrong are put right, each to go with a Triton
that does it itself. tests/conftest.py chooses the interpreter where there is no GPU: Triton's
kernels take CPU tensors there; where there is one they are compiled and take CUDA tensors alone.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from carillon.kernels.table import OPS, ProviderError, load_native, resolve

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


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `provider` and `device` by each provider that the table has of its op,
    on each device here; one that takes `device` alone, on each device.

    The op is the marker's: `pytestmark = pytest.mark.op("fp8_cast")`. Tests on CUDA are marked
    `gpu`: `pytest tests/kernels -m gpu`.
    """
    if "device" not in metafunc.fixturenames:
        return
    if "provider" not in metafunc.fixturenames:
        metafunc.parametrize("device", [_on(device) for device in DEVICES])
        return
    op = metafunc.definition.get_closest_marker("op").args[0]
    pairs = [(name, device) for device in DEVICES for name in OPS[op].providers[device]]
    runs = [_on(device, provider, op) for provider, device in pairs if _takes(provider, device)]
    metafunc.parametrize(("provider", "device"), runs)


def _takes(provider: str, device: str) -> bool:
    return provider != "triton" or device == "cuda" or not torch.cuda.is_available()


def _on(device: str, *provider_and_op: str) -> Any:
    """A parameter set; on a GPU a provider that cannot run is skipped, and says why."""
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if device == "cuda" and provider_and_op:
        provider, op = provider_and_op
        try:
            resolve(op, device, provider)
        except ProviderError as error:
            marks.append(pytest.mark.skip(reason=str(error)))
    return pytest.param(*provider_and_op[:1], device, marks=marks)


@pytest.fixture
def kernel(provider: str, device: str) -> Callable[[str], Callable[..., Any]]:
    """Gives an op by its name, by the test's provider: it takes tensors of the CPU and returns
    such, whatever device it computes on."""
    return lambda op: _carried(resolve(op, device, provider), device)


def _carried(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    if device == "cpu":
        return op

    def call(*arguments: Any, **settings: Any) -> Any:
        there = {name: _moved(value, device) for name, value in settings.items()}
        results = op(*(_moved(value, device) for value in arguments), **there)
        if isinstance(results, Tensor):
            return results.cpu()
        return tuple(result.cpu() for result in results)

    return call


def _moved(value: Any, device: str) -> Any:
    """On the device, with its strides and its place in a storage where it needs no gradient."""
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad:
        return value.to(device)
    storage = value.new_empty(0).set_(value.untyped_storage())  # type: ignore[call-overload]
    return storage.to(device).as_strided(value.size(), value.stride(), value.storage_offset())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `not_interpreted` where Triton's interpreter would run it: it takes
    seconds for what a GPU does at once."""

    def interpreted(item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        return given is not None and (given.params.get("provider"), given.params.get("device")) == (
            "triton",
            "cpu",
        )

    left_out = [x for x in items if x.get_closest_marker("not_interpreted") and interpreted(x)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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

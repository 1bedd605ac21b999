"""Random arguments, right ones and wrong ones: the native op and the reference both give the same
result or both raise ValueError, and nothing else happens. Under `make asan` no byte outside the
tensors is touched either."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carillon.kernels.table import OPS, load_native, resolve
from carillon.kernels.tolerances import TOLERANCES, Tolerance

SHARED = runpy.run_path(str(Path(__file__).with_name("any_arguments.py")))
ARGUMENTS, spoil = SHARED["ARGUMENTS"], SHARED["spoil"]
KEYWORDS = ("column", "power_of_two", "check_finite")  # of fp8_cast
EXACT = Tolerance(atol=0.0, rtol=0.0)


SETS = st.sampled_from(["portable", "avx2", "avx512", "avx512_bf16"])


@pytest.fixture(autouse=True)
def widest_again() -> Iterator[None]:
    """Each example takes an instruction set, or a narrower one that the processor has."""
    load_native()
    yield
    torch.ops.carillon.limit_instruction_set("avx512_bf16")


def outcome(op: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...] | ValueError:
    keywords = {name: arguments[name] for name in KEYWORDS if name in arguments}
    positional = [value for name, value in arguments.items() if name not in keywords]
    try:
        results = op(*positional, **keywords)
    except ValueError as error:
        return error
    return (results,) if isinstance(results, Tensor) else tuple(results)


def drawn(data: st.DataObject, op: str) -> tuple[dict[str, Any], int]:
    """Arguments, and how many of them were spoiled."""
    torch.ops.carillon.limit_instruction_set(data.draw(SETS))
    arguments = ARGUMENTS[op](data.draw)
    num_spoiled = data.draw(st.integers(0, 2))
    for _ in range(num_spoiled):
        arguments = spoil(data.draw, arguments)
    return arguments, num_spoiled


def assert_near(op: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Each may stand as far from the definition as its tolerance, in the unit of that."""
    largest = [
        max([1.0, *x[x.isfinite()].abs().tolist()]) for x in map(torch.Tensor.double, wanted)
    ]
    if op == "packed_attention_backward":
        largest = [max(largest)] * len(largest)
    for a, b, unit in zip(got, wanted, largest, strict=True):
        tolerance = (
            EXACT if op in ("fp8_cast", "moe_plan") else TOLERANCES.get((op, b.dtype), EXACT)
        )
        # A gradient's terms are rounded, and those of two signs may leave little of themselves.
        terms = tolerance.rtol if op.endswith("backward") else 0.0
        torch.testing.assert_close(
            a.double() / unit,
            b.double() / unit,
            atol=2 * (tolerance.atol + terms),
            rtol=2 * tolerance.rtol,
            equal_nan=True,
        )


def test_every_op_has_arguments() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("carillon::") for s in schemas if s.name.startswith("carillon::")}
    assert set(ARGUMENTS) == names - {"limit_instruction_set"}


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_native_does_as_the_reference(op: str, data: st.DataObject) -> None:
    arguments, num_spoiled = drawn(data, op)
    got = outcome(resolve(op, "cpu", "native"), arguments)
    wanted = outcome(resolve(op, "cpu", "reference"), arguments)
    assert isinstance(got, ValueError) == isinstance(wanted, ValueError), (got, wanted)
    if isinstance(got, ValueError) or isinstance(wanted, ValueError):
        return
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in wanted]
    # Of a spoiled call its out and lse are no results, and weights without bound follow from them.
    if op != "packed_attention_backward" or not num_spoiled:
        assert_near(op, got, wanted)


@pytest.mark.parametrize("op", [name for name in ARGUMENTS if name not in OPS])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_backward_gives_gradients_or_says_why(op: str, data: st.DataObject) -> None:
    arguments, num_spoiled = drawn(data, op)
    got = outcome(getattr(torch.ops.carillon, op), arguments)
    if isinstance(got, ValueError):
        assert num_spoiled
        return
    on_meta = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in arguments.items()}
    wanted = outcome(getattr(torch.ops.carillon, op), on_meta)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in wanted]

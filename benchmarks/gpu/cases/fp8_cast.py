"""fp8_cast, both copies of a matrix, beside a plain copy of it whose bandwidth is the yardstick."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from case import Bar, Call, Case, Outputs, Side, of_peers, of_providers
from torch import Tensor

from carillon.kernels.fp8_cast.layout import GRANULARITIES
from carillon.kernels.fp8_cast.reference import cost, fp8_cast

OP = "fp8_cast"
E4M3 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Of the bytes that must move: tensorwise and rowwise need all of x before the first code, and read
# it twice, from the cache where that holds it.
BAR = Bar("bandwidth", 0.85, "copy")


class Given(NamedTuple):
    x: Tensor
    scale: Tensor | None


def cases(tiny: bool) -> list[Case]:
    kinds = (*GRANULARITIES, "given")
    if tiny:
        return [
            _case(group, kind, 128, 256, "bf16") for group in ("check", "bar") for kind in kinds
        ]
    checks = [_case("check", kind, 1000, 2040, dtype) for kind in kinds for dtype in DTYPES]
    bars = [_case("bar", kind, 16_384, 8192, "bf16") for kind in kinds]
    sweep = [_case("sweep", kind, *size, "bf16") for size in SIZES for kind in kinds]
    sweep += [_case("sweep", kind, 8192, 8192, "fp32") for kind in kinds]
    return [*checks, *bars, *sweep]


SIZES = ((4096, 4096), (32_768, 4096))


def _case(group: str, kind: str, rows: int, columns: int, dtype: str) -> Case:
    return Case(
        name=f"{kind} {rows}x{columns} {dtype}",
        group=group,
        values={"granularity": kind, "rows": rows, "columns": columns, "dtype": dtype},
        costs=(cost(rows, columns, DTYPES[dtype].itemsize, column=True),),
        bars=(BAR,) if group == "bar" else (),
    )


def draw(case: Case, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.values["rows"], case.values["columns"])
    x = torch.randn(shape, device=device, generator=generator).to(DTYPES[case.values["dtype"]])
    given = case.values["granularity"] == "given"
    return Given(x, torch.tensor(0.01, device=device) if given else None)


def _granularity(case: Case) -> str:
    kind: str = case.values["granularity"]
    return "tensorwise" if kind == "given" else kind


def _cast(op: Any, case: Case, given: Given) -> Call:
    return lambda: op(given.x, _granularity(case), E4M3, given.scale, column=True)


def _checked(call: Call) -> Call:
    """The codes' bytes as numbers: providers agree to the bit, so no error is allowed."""
    return lambda: [x.view(torch.uint8).float() if x.itemsize == 1 else x for x in call()]


def sides(case: Case, device: str) -> list[Side]:
    if case.group == "check":
        checked = of_providers(
            OP, device, lambda kernel: lambda given: _checked(_cast(kernel(OP), case, given))
        )
        return [side for side in checked if side.kind == "ours"]
    ours = of_providers(OP, device, lambda kernel: lambda given: _cast(kernel(OP), case, given))
    dtype = DTYPES[case.values["dtype"]]
    copied_bytes = 2.0 * case.values["rows"] * case.values["columns"] * dtype.itemsize
    copy = Side("copy", "yardstick", lambda given: lambda: [given.x.clone()], copied_bytes)

    def find(peers: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return peers.available(device), peers.missing(device)

    def make(cast: Any) -> Any:
        return lambda given: lambda: cast(given.x, _granularity(case), given.scale)

    return [*ours, copy, *of_peers(OP, find, make)]


def expected(case: Case, given: Given) -> Outputs:
    return _checked(_cast(fp8_cast, case, given))()

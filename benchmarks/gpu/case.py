"""What the GPU suite measures: cases of an operator, and the sides that compute each.

A module in cases/ describes one operator by five names (`Module`). Sides are our providers, from
the table, and the peers of benchmarks/peers; one that cannot run says why when it is prepared.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from carillon.kernels.roofline import Cost
from carillon.kernels.table import OPS, Kernel, ProviderError, resolve

GROUPS = ("check", "bar", "sweep", "long", "train")
BENCHMARKS = Path(__file__).resolve().parents[1]


class Unavailable(Exception):
    """A side cannot run here; the message says why."""


class Bar(NamedTuple):
    """What our best provider must reach in a case.

    `what` is "ms" or "MiB" (of memory in all), at most `limit`; "ratio", the time of `peer` over
    ours, at least `limit`, of the fastest peer where `peer` is ""; "bandwidth", at least `limit`
    of that of the side `peer`; or "images/s", at least `limit`.
    """

    what: str
    limit: float
    peer: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `costs` are those of the passes that are timed, one after the other.

    `limit` is the most that an output may differ from the expected one, ||difference|| over
    ||expected||, in the group "check". It catches a wrong kernel in seconds; tests/kernels hold the
    bounds of single values. `items` is what a call works through, such as ("images", 256): its rate
    and model FLOP/s utilisation are given too.
    """

    name: str
    group: str
    values: Mapping[str, Any]
    costs: tuple[Cost, ...] = ()
    bars: tuple[Bar, ...] = ()
    limit: float = 0.0
    most_rounds: int = 100
    items: tuple[str, int] | None = None


Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]


class Side(NamedTuple):
    """One contestant. `prepare` takes what `draw` gave and returns what is timed.

    `size_bytes` is what a call moves, where that is not the case's cost (a plain copy).
    """

    name: str
    kind: str  # "ours", "definition", "peer" or "yardstick"
    prepare: Callable[[Any], Call]
    size_bytes: float | None = None

    @property
    def is_slow(self) -> bool:
        """Whether its turn comes after the others': torch.compile has to compile it first, or it
        is the definition, which is no contestant."""
        return "compile" in self.name or self.name == "flex" or self.kind == "definition"


class Module(Protocol):
    """One operator: its name, cases, inputs on a device, sides, and what is right."""

    OP: str

    def cases(self, tiny: bool) -> Sequence[Case]: ...
    def draw(self, case: Case, device: str) -> Any: ...
    def sides(self, case: Case, device: str) -> Sequence[Side]: ...
    def expected(self, case: Case, given: Any) -> Outputs: ...


def load(path: Path) -> Module:
    """A module of an operator, by its file."""
    for folder in (str(BENCHMARKS), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"cases_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module  # type: ignore[return-value]


def of_providers(
    op: str, device: str, make: Callable[[Callable[[str], Kernel]], Callable[[Any], Call]]
) -> list[Side]:
    """A side for each provider that the table has of `op` on the device.

    `make` gets a function from an op's name to its kernel by that provider.
    """
    names = OPS[op].providers.get(device.partition(":")[0], ())
    return [_of_provider(name, device, make) for name in names]


def _of_provider(
    provider: str,
    device: str,
    make: Callable[[Callable[[str], Kernel]], Callable[[Any], Call]],
) -> Side:
    def kernel(op: str) -> Kernel:
        try:
            return resolve(op, device, provider)
        except (ProviderError, ValueError) as error:
            raise Unavailable(str(error)) from error

    kind = "definition" if provider == "reference" else "ours"
    return Side(provider, kind, lambda given: make(kernel)(given))


def of_peers(
    op: str,
    find: Callable[[Any], tuple[Mapping[str, Any], Mapping[str, str]]],
    make: Callable[[Any], Callable[[Any], Call]],
) -> list[Side]:
    """A side for each peer of benchmarks/peers/<op>.py, those that are missing too.

    `find` gets that module and gives what is there, and why the others are not.
    """
    try:
        available, missing = find(importlib.import_module(f"peers.{op}"))
    except Exception as error:
        return [_absent("peers", f"peers/{op}.py: {type(error).__name__}: {error}")]
    sides = [Side(name, "peer", make(peer)) for name, peer in available.items()]
    return sides + [_absent(name, reason) for name, reason in missing.items()]


def _absent(name: str, reason: str) -> Side:
    def prepare(given: Any) -> Call:
        raise Unavailable(reason)

    return Side(name, "peer", prepare)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; infinite for another shape, and for what is not a number.

    Equal infinities are equal.
    """
    if got.shape != expected.shape:
        return math.inf
    left, right = got.detach().double(), expected.detach().double()
    difference = left.sub(right).masked_fill_(left == right, 0.0).norm().item()
    scale = right.masked_fill(right.isinf(), 0.0).norm().item()
    if difference == 0.0:
        return 0.0
    error = difference / scale if scale > 0 else math.inf
    return math.inf if math.isnan(error) else error

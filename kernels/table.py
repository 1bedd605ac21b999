"""The table of operators, and the choice of the provider that computes one.

An operator is defined by its reference (plain torch, carillon.kernels.<op>.reference); a provider
computes the same thing faster. The device picks the provider, or the caller names one; a provider
that cannot run raises and says why. Nothing falls back by itself: a slow reference taken silently
would look like a slow machine.
Left out: choosing by shape or by measurement.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

Kernel = Callable[..., Tensor]

BUILD_COMMAND = "pip install -e . --no-build-isolation"


class ProviderError(RuntimeError):
    """A provider cannot run here; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator: its providers by device type, the default one first."""

    name: str
    providers: Mapping[str, tuple[str, ...]]


OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op(
                name="image_normalize",
                # The CUDA kernel has compiled, not run (docs/gpu-status.md), and is small beside a
                # training step: it is taken by name only until it has.
                providers={"cpu": ("native", "reference"), "cuda": ("reference", "native")},
            ),
        )
    }
)


def resolve(op: str, device: torch.device | str, provider: str | None = None) -> Kernel:
    """Returns the function that computes `op` on `device`, by `provider` where one is named.

    Raises:
        ValueError: an unknown op, a device type without providers, a provider that the op
            does not have there.
        ProviderError: the provider exists but cannot run here (not built, built for another
            torch, no CUDA).
    """
    if op not in OPS:
        raise ValueError(f"unknown op '{op}': the ops are {', '.join(sorted(OPS))}")
    kind = torch.device(device).type
    names = OPS[op].providers.get(kind)
    if names is None:
        raise ValueError(f"{op} runs on {', '.join(OPS[op].providers)}; the device is '{device}'")
    chosen = names[0] if provider is None else provider
    if chosen not in names:
        raise ValueError(f"{op} on {kind} has the providers {', '.join(names)}; got '{chosen}'")
    return _PROVIDERS[chosen](op, kind)


def _reference(op: str, kind: str) -> Kernel:
    return cast(Kernel, getattr(importlib.import_module(f"carillon.kernels.{op}.reference"), op))


def _native(op: str, kind: str) -> Kernel:
    with_cuda = load_native()
    if kind == "cuda" and not with_cuda:
        raise ProviderError(
            f"the native provider of {op} was built without CUDA: with nvcc and a CUDA build of "
            f"torch installed, run '{BUILD_COMMAND}', or choose the provider 'reference'"
        )
    return cast(Kernel, getattr(torch.ops.carillon, op))


_PROVIDERS: Mapping[str, Callable[[str, str], Kernel]] = MappingProxyType(
    {"native": _native, "reference": _reference}
)


@functools.cache
def load_native() -> bool:
    """Loads carillon._C and registers each op's shape function; returns whether it has CUDA.

    Raises:
        ProviderError: the module is missing, or was compiled for another release of torch.
    """
    try:
        from carillon import _C
    except ImportError as error:
        raise ProviderError(
            f"the native operators cannot be loaded ({error}): build them by '{BUILD_COMMAND}' "
            "in the checkout, or choose the provider 'reference'"
        ) from error
    running = torch.__version__.split("+")[0]
    if running != _C.TORCH_VERSION:
        raise ProviderError(
            f"the native operators were built for torch {_C.TORCH_VERSION}, and torch {running} "
            f"runs: build them anew by '{BUILD_COMMAND}'"
        )
    for op in OPS:
        importlib.import_module(f"carillon.kernels.{op}.registration").register()
    return _C.WITH_CUDA

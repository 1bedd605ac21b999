"""The table of operators, and the choice of the provider that computes one.

An operator is defined by its reference (plain torch, carillon.kernels.<folder>.reference); a
provider computes the same thing faster. The device picks the provider, or the caller names one; a
provider that cannot run raises and says why. Nothing falls back by itself: a slow reference taken
silently would look like a slow machine.
`native` (C++ and CUDA) is torch.ops.carillon.<op>, `triton` is torch.ops.carillon_triton.<op> and
`torch` (torch's own fused op, where it has one) torch.ops.carillon_torch.<op>: the same schemas,
which csrc/bindings.cpp declares, and the same shape functions and autograd formulas.
Left out: choosing by shape or by measurement.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import torch

Kernel = Callable[..., Any]

BUILD_COMMAND = "pip install -e . --no-build-isolation"


class ProviderError(RuntimeError):
    """A provider cannot run here; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator: its providers by device type, the default one first.

    `folder` is where it is defined, for ops that share their definition with others.
    """

    name: str
    providers: Mapping[str, tuple[str, ...]]
    folder: str = ""

    @property
    def home(self) -> str:
        """The package of its reference, registration and Triton kernels."""
        return f"carillon.kernels.{self.folder or self.name}"


def _op(
    name: str, folder: str = "", *, cpu: tuple[str, ...] = (), cuda: tuple[str, ...] = ()
) -> Op:
    """One with a native provider on the CPU and Triton's on CUDA, and others by device.

    On CUDA all but the reference are taken by name only until they have run there
    (docs/gpu-status.md).
    """
    return Op(
        name=name,
        providers={
            "cpu": ("native", "reference", "triton", *cpu),
            "cuda": ("reference", "triton", *cuda),
        },
        folder=folder,
    )


OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op(
                name="image_normalize",
                # Its CUDA kernel too is taken by name only until it has run.
                providers={"cpu": ("native", "reference"), "cuda": ("reference", "native")},
            ),
            _op("contrastive", cuda=("native",)),
            _op("contrastive_sigmoid", "contrastive", cuda=("native",)),
            # What their autograd formulas call, and a loss whose columns come in chunks.
            _op("contrastive_backward", "contrastive", cuda=("native",)),
            _op("contrastive_sigmoid_backward", "contrastive", cuda=("native",)),
            _op("packed_attention", cuda=("flash_attn", "cudnn")),
            # What the autograd formula of the one before calls.
            _op("packed_attention_backward", "packed_attention"),
            _op("fp8_cast"),
            *(
                _op(name, "moe_routing", cuda=("native",))
                for name in ("moe_topk", "moe_plan", "moe_permute", "moe_unpermute")
            ),
            *(
                _op(name, "moe_routing", cpu=("torch",), cuda=("torch",))
                for name in ("grouped_mm", "gather_grouped_mm")
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
    kernel: Kernel = getattr(_RESOLVED, _resolve(op, device, provider))
    return kernel


# Where `_resolve` leaves what it found: torch.compile takes no function as a constant.
_RESOLVED = SimpleNamespace()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve(op: str, device: torch.device | str, provider: str | None) -> str:
    """The name of the attribute of _RESOLVED.

    torch.compile calls this as it is: tracing the imports would cut a compiled block in two at
    each of its ops.
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
    name = f"{op}_{kind}_{chosen}"
    setattr(_RESOLVED, name, _PROVIDERS[chosen](op, kind))
    return name


def _reference(op: str, kind: str) -> Kernel:
    return cast(Kernel, getattr(importlib.import_module(f"{OPS[op].home}.reference"), op))


def _native(op: str, kind: str) -> Kernel:
    with_cuda = load_native()
    if kind == "cuda" and not with_cuda:
        raise ProviderError(
            f"the native provider of {op} was built without CUDA: with nvcc and a CUDA build of "
            f"torch installed, run '{BUILD_COMMAND}', or choose the provider 'reference'"
        )
    return cast(Kernel, getattr(torch.ops.carillon, op))


def _triton(op: str, kind: str) -> Kernel:
    load_triton()
    if kind == "cpu" and not interprets_triton():
        raise ProviderError(
            f"the Triton provider of {op} runs on the CPU in Triton's interpreter only: set "
            "TRITON_INTERPRET=1 before Python starts, or choose another provider"
        )
    return cast(Kernel, getattr(torch.ops.carillon_triton, op))


def _torch(op: str, kind: str) -> Kernel:
    load_torch()
    return cast(Kernel, getattr(torch.ops.carillon_torch, op))


def _external(provider: str, op: str, kind: str) -> Kernel:
    """Another library's, which need not be installed."""
    return cast(Kernel, importlib.import_module(f"{OPS[op].home}.external").load(provider))


_PROVIDERS: Mapping[str, Callable[[str, str], Kernel]] = MappingProxyType(
    {
        "native": _native,
        "reference": _reference,
        "triton": _triton,
        "torch": _torch,
        **{name: functools.partial(_external, name) for name in ("flash_attn", "cudnn")},
    }
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
    for home in _homes():
        importlib.import_module(f"{home}.registration").register("carillon")
    return _C.WITH_CUDA


@functools.cache
def load_triton() -> torch.library.Library:
    """Defines carillon_triton, the native schemas computed by Triton; the caller keeps nothing.

    Raises:
        ProviderError: Triton is missing, or the native module that declares the schemas.
    """
    load_native()
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ProviderError(
            f"Triton cannot be imported ({error}): install it by 'pip install triton', or choose "
            "another provider"
        ) from error
    return _define("triton", ("CUDA", "CPU") if interprets_triton() else ("CUDA",))


@functools.cache
def load_torch() -> torch.library.Library:
    """Defines carillon_torch, native schemas computed by torch; the caller keeps nothing.

    Raises:
        ProviderError: the native module that declares the schemas is missing.
    """
    load_native()
    return _define("torch", ("CUDA", "CPU"))


def _define(provider: str, keys: tuple[str, ...]) -> torch.library.Library:
    """A namespace of the provider's ops, with the native schemas."""
    namespace = f"carillon_{provider}"
    library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
    for home in _homes(provider):
        implementation = importlib.import_module(f"{home}.{provider}_impl")
        for name, function in implementation.IMPLEMENTS.items():
            schema = str(getattr(torch.ops.carillon, name).default._schema)
            library.define(schema.removeprefix("carillon::"))  # type: ignore[no-untyped-call]
            for key in keys:
                guarded = _on_its_device(function) if key == "CUDA" else function
                library.impl(name, guarded, key)  # type: ignore[no-untyped-call]
        importlib.import_module(f"{home}.registration").register(namespace)
    return library


def _on_its_device(function: Kernel) -> Kernel:
    """Runs on the device of the first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        first = next(value for value in arguments if isinstance(value, torch.Tensor))
        with torch.cuda.device(first.device):
            return function(*arguments, **settings)

    return call


def interprets_triton() -> bool:
    """Whether Triton kernels run in the interpreter, which takes CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _homes(provider: str | None = None) -> list[str]:
    """The packages of the ops, or of those that have this provider, each once."""
    ops = [
        op
        for op in OPS.values()
        if provider is None or any(provider in names for names in op.providers.values())
    ]
    return list(dict.fromkeys(op.home for op in ops))

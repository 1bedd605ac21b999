"""packed_attention by other libraries: flash-attn (2 or 3) and cuDNN, which torch brings.

Both are named providers on CUDA, for what they can: bfloat16, the plain and the causal mask, a
positive scale, a gradient of out alone; whatever else is refused, never computed by other means.
The lengths stay on the device: wrong ones are caught there by an assertion, which ends the process'
use of the GPU, before the library reads by them. Backward passes are not deterministic.
cuDNN is called on equal lengths, as a batch: torch's call of it for variable lengths is switched
off in torch itself (torch.nn.attention.varlen, 2.13). Left out: cuDNN with fewer key heads.
Status: arguments and results checked on the CPU against stand-ins of the documented signatures; not
run on a GPU yet.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carillon.kernels.packed_attention import reference
from carillon.kernels.packed_attention.check import check, check_values
from carillon.kernels.table import Kernel, ProviderError

_FLASH_MAX_HEAD_DIM = 256
_CUDNN_MAX_HEAD_DIM = 128  # of its backward pass
_FLASH_OLDEST = (2, 6)  # the first whose lse is (num_heads, total_q)
_ALIGNMENT_BYTES = 16


def load(provider: str) -> Kernel:
    """The op by `flash_attn` or `cudnn`.

    Raises:
        ProviderError: the library is not installed, or too old.
    """
    return {"flash_attn": _load_flash, "cudnn": _load_cudnn}[provider]()


def _load_flash() -> Kernel:
    newer, older = _import("flash_attn_interface"), _import("flash_attn")
    if older is not None:
        version = tuple(int(part) for part in older.__version__.split(".")[:2])
        if version < _FLASH_OLDEST and newer is None:
            raise ProviderError(
                f"the provider flash_attn needs flash-attn 2.6 or later, found {older.__version__}:"
                " 'pip install -U flash-attn --no-build-isolation', or choose another provider"
            )
    if newer is None and older is None:
        raise ProviderError(
            "the provider flash_attn needs flash-attn: 'pip install flash-attn "
            "--no-build-isolation' (2.6 or later), or its version 3, which is built from the "
            "folder hopper of its repository; or choose another provider"
        )
    return functools.partial(_compute, "flash_attn", functools.partial(_flash, newer, older))


def _load_cudnn() -> Kernel:
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        raise ProviderError(
            f"the provider cudnn needs a CUDA build of torch, which brings cuDNN; torch "
            f"{torch.__version__} has none: 'pip install torch', or choose another provider"
        )
    return functools.partial(_compute, "cudnn", _cudnn)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _compute(
    provider: str,
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The op (reference.py) by a library."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check(q, k, v, *lengths, causal, prefix_lengths, scale)
    factor = reference.default_scale(q.shape[2]) if scale is None else scale
    _require(provider, q.dtype == torch.bfloat16, "bfloat16", q.dtype)
    _require(provider, prefix_lengths is None, "no prefix_lengths", "some")
    _require(provider, factor > 0, "a positive scale", factor)
    if q.device.type == "cpu":
        check_values(q, k, *lengths, None)
    else:
        _assert_lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        _assert_lengths("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if q.shape[0] == 0 or k.shape[0] == 0:  # nothing to attend with, or to: they refuse it
        return reference.packed_attention(q, k, v, *lengths, causal, None, scale)
    out, lse = attend(*(_aligned(x) for x in (q, k, v)), *lengths, causal, factor)
    # flash-attn 2 says +inf of a query that sees nothing.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    kept: tuple[Tensor, Tensor] = _OutAlone.apply(out.contiguous(), lse, provider)  # type: ignore[no-untyped-call]
    return kept


def _require(provider: str, right: bool, allowed: str, given: object) -> None:
    if not right:
        raise ValueError(
            f"packed_attention: the provider {provider} takes {allowed}, got {given}; the others "
            "take all that the op does"
        )


def _assert_lengths(of: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Without a wait: the GPU reports it when it gets there."""
    steps = cu_seqlens.diff()
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
    right = right & ((steps >= 0) & (steps <= max_seqlen)).all()
    torch._assert_async(
        right,
        f"packed_attention: cu_seqlens_{of} must run from 0 to {total} without decreasing, by at "
        f"most max_seqlen_{of} = {max_seqlen}",
    )


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows are dense and aligned, as slices of one projection are."""
    step = _ALIGNMENT_BYTES // x.element_size()
    dense = x.stride(2) == 1 and not (x.stride(0) % step or x.stride(1) % step)
    return (
        x
        if dense and x.data_ptr() % _ALIGNMENT_BYTES == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


class _OutAlone(torch.autograd.Function):
    """Passes both results on, and refuses a gradient of lse, which the libraries would drop."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, provider: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.provider = provider
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_out, grad_lse = grads
        _require(ctx.provider, grad_lse is None, "a gradient of out alone", "one of lse")
        return grad_out, None, None


def _flash(
    newer: Any,
    older: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """flash-attn 3 on the chip that it is for (sm_90), or where there is no other; else 2."""
    hopper = q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] == 9
    module = newer if newer is not None and (hopper or older is None) else older
    function = module.flash_attn_varlen_func
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    # The first versions 3 always return lse, and have no such argument.
    if "return_attn_probs" in inspect.signature(function).parameters:
        options["return_attn_probs"] = True
    starts = (
        cu_seqlens.to(torch.int32).contiguous() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)
    )
    out, lse, *_ = function(q, k, v, *starts, max_seqlen_q, max_seqlen_k, **options)
    if lse.shape != (q.shape[1], q.shape[0]):
        raise ProviderError(
            f"{module.__name__} gave an lse of the shape {list(lse.shape)}, not (num_heads, "
            f"total_q) = {[q.shape[1], q.shape[0]]}: install flash-attn 2.6 or later"
        )
    return out, lse


def _cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """By torch's own call of cuDNN, [batch, heads, tokens, head_dim] in any strides."""
    num_sequences = cu_seqlens_q.shape[0] - 1
    _require("cudnn", q.shape[2] <= _CUDNN_MAX_HEAD_DIM, "head_dim up to 128", q.shape[2])
    _require(
        "cudnn", q.shape[1] == k.shape[1], "as many key heads as heads", [q.shape[1], k.shape[1]]
    )
    for of, x, longest in (("q", q, max_seqlen_q), ("k", k, max_seqlen_k)):
        # With lengths of at most max_seqlen, this total says that each is max_seqlen.
        equal = x.shape[0] == num_sequences * longest
        allowed = f"equal lengths, total_{of} = {num_sequences} * max_seqlen_{of} ({longest})"
        _require("cudnn", equal, allowed, x.shape[0])
    # Its causal mask is aligned at the top left, the op's at the bottom right.
    same = not causal or max_seqlen_q == max_seqlen_k
    _require("cudnn", same, "causal for as many queries as keys", [max_seqlen_q, max_seqlen_k])
    q_BHLD, k_BHLD, v_BHLD = (
        x.view(num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
    )
    out_BHLD, lse_BHL1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHLD, k_BHLD, v_BHLD, None, True, 0.0, causal, False, scale=scale
    )
    out = out_BHLD.transpose(1, 2).flatten(0, 1)
    return out, lse_BHL1.squeeze(3).transpose(0, 1).flatten(1)

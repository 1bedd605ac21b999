"""flash-attn and cuDNN as providers: neither is here, so stand-ins with their documented signatures
take the arguments, check them, and answer in the layouts that the libraries document."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.packed_attention import external
from carillon.kernels.packed_attention.reference import packed_attention
from carillon.kernels.table import ProviderError, resolve
from carillon.kernels.tolerances import TOLERANCES

BFLOAT16 = torch.bfloat16
CALLS: list[str] = []


def answer(name: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As flash-attn: int32 lengths, dense rows, no gradient of lse, +inf where nothing is seen."""
    CALLS.append(name)
    starts_q, starts_k, longest_q, longest_k, scale, causal = rest
    assert (starts_q.dtype, starts_k.dtype) == (torch.int32, torch.int32)
    assert starts_q.is_contiguous()
    assert starts_k.is_contiguous()
    for x in (q, k, v):
        assert x.dtype == BFLOAT16
        assert x.stride(2) == 1
        assert x.data_ptr() % 16 == 0
        assert x.stride(0) % 8 == x.stride(1) % 8 == 0
    out, lse = packed_attention(
        q, k, v, starts_q, starts_k, longest_q, longest_k, causal, None, scale
    )
    return out, lse.detach().masked_fill(lse == -torch.inf, torch.inf)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
) -> Any:  # fmt: skip
    assert (dropout_p, window_size, softcap) == (0.0, (-1, -1), 0.0)
    assert return_attn_probs
    out, lse = answer("2", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                      softmax_scale, causal)  # fmt: skip
    return out, lse, torch.empty(0)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
) -> Any:  # fmt: skip
    assert seqused_q is seqused_k is None
    assert return_attn_probs
    return answer("3", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                  softmax_scale, causal)  # fmt: skip


def first_flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
    causal=False, window_size=(-1, -1), deterministic=False,
) -> Any:  # fmt: skip
    return answer("first 3", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                  softmax_scale, causal)  # fmt: skip


def cudnn(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
) -> Any:  # fmt: skip
    """[batch, heads, tokens, head_dim], lse [..., 1], causal at the top left."""
    CALLS.append("cudnn")
    assert attn_bias is None
    assert compute_log_sumexp
    assert dropout_p == 0.0
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = (scores.softmax(3) @ value.float()).to(query.dtype)
    lse = scores.detach().logsumexp(3, keepdim=True)
    return out, lse, None, None, scores.shape[2], scores.shape[3], None, None, None


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Any, version: str = "") -> None:
    module = ModuleType(name)
    module.__dict__.update(flash_attn_varlen_func=function, __version__=version)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is, whatever the machine has."""
    CALLS.clear()
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    return monkeypatch


@pytest.fixture(params=["flash 2", "flash 3", "first flash 3", "cudnn"])
def provider(request: pytest.FixtureRequest, installed: pytest.MonkeyPatch) -> str:
    if request.param == "cudnn":
        installed.setattr(torch.backends.cudnn, "is_available", lambda: True)
        installed.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
        return "cudnn"
    if request.param == "flash 2":
        install(installed, "flash_attn", flash_2, "2.8.3")
    else:
        function = flash_3 if request.param == "flash 3" else first_flash_3
        install(installed, "flash_attn_interface", function)
    return "flash_attn"


def assert_right(batch: Any, provider: str) -> None:
    batch = dataclasses.replace(batch, grad_lse=torch.zeros_like(batch.grad_lse))
    inputs = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    out, lse = resolve("packed_attention", "cuda", provider)(*inputs, *batch.arguments())
    assert out.is_contiguous()
    grads = torch.autograd.grad(out, inputs, batch.grad_out)
    wanted = batch.definition()
    largest = max(float(x.abs().max()) for x in wanted[2:])
    for got, right, like, dtype, unit in [
        (out, wanted[0], "packed_attention", BFLOAT16, 1.0),
        (lse, wanted[1], "packed_attention", torch.float32, 1.0),
        *(
            (x, y, "packed_attention_backward", BFLOAT16, largest)
            for x, y in zip(grads, wanted[2:], strict=True)
        ),
    ]:
        tolerance = TOLERANCES[like, dtype]
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double() / unit, right / unit, atol=tolerance.atol, rtol=tolerance.rtol
        )


@pytest.mark.parametrize("case", [{}, {"causal": True}, {"scale": 0.3}], ids=str)
def test_equal_lengths(new_batch: Any, provider: str, case: dict[str, Any]) -> None:
    assert_right(new_batch((7, 7, 7), dtype=BFLOAT16, head_dim=24, **case), provider)
    assert len(CALLS) == 1


def test_cross_attention_of_equal_lengths(new_batch: Any, provider: str) -> None:
    assert_right(new_batch((3, 3), (5, 5), dtype=BFLOAT16, head_dim=24), provider)


LENGTHS: list[dict[str, Any]] = [
    {"lengths_q": (5, 0, 9), "lengths_k": (2, 4, 9), "causal": True, "heads": (4, 2)},
    {"lengths_q": (5, 3), "lengths_k": (0, 4)},
]


@pytest.mark.parametrize("case", LENGTHS, ids=["causal, rows that see nothing", "no keys"])
def test_flash_takes_any_lengths(installed: Any, new_batch: Any, case: dict[str, Any]) -> None:
    for name, function in (("flash_attn", flash_2), ("flash_attn_interface", flash_3)):
        with installed.context() as patch:
            install(patch, name, function, "2.6.0")
            assert_right(new_batch(dtype=BFLOAT16, head_dim=16, **case), "flash_attn")
    assert CALLS == ["2", "3"]


def test_odd_layouts_reach_the_library_aligned(new_batch: Any, provider: str) -> None:
    batch = new_batch((6, 6), dtype=BFLOAT16, head_dim=24)
    odd = torch.zeros(3, 12, 2, 27, dtype=BFLOAT16)
    odd[..., 1:25] = torch.stack([batch.q, batch.k, batch.v])
    op = resolve("packed_attention", "cuda", provider)
    out, lse = op(*odd[..., 1:25].unbind(0), *batch.arguments())
    dense = op(batch.q, batch.k, batch.v, *batch.arguments())
    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (3, 2)), ((2, 3), (0, 0))])
def test_empty(new_batch: Any, provider: str, lengths: Any) -> None:
    batch = new_batch(*lengths, dtype=BFLOAT16, head_dim=8)
    out, lse = resolve("packed_attention", "cuda", provider)(
        batch.q, batch.k, batch.v, *batch.arguments()
    )
    assert out.shape == batch.q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert CALLS == []


def test_gradient_of_lse_is_refused(new_batch: Any, provider: str) -> None:
    batch = new_batch((4, 4), dtype=BFLOAT16, head_dim=8)
    q = batch.q.requires_grad_()
    op = resolve("packed_attention", "cuda", provider)
    for use in (lambda out, lse: lse.sum(), lambda out, lse: out.sum() + lse.sum()):
        with pytest.raises(ValueError, match=f"{provider} takes a gradient of out alone"):
            use(*op(q, batch.k, batch.v, *batch.arguments())).backward()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float32}, r"takes bfloat16, got torch\.float32"),
    ({"causal": True, "prefixes": (1, 2)}, "takes no prefix_lengths, got some"),
    ({"scale": -0.5}, "takes a positive scale, got -0.5"),
    ({"scale": 0.0}, r"takes a positive scale, got 0\.0"),
]
REFUSED_BY_CUDNN: list[tuple[dict[str, Any], str]] = [
    ({"head_dim": 136}, "takes head_dim up to 128, got 136"),
    ({"heads": (4, 2)}, r"takes as many key heads as heads, got \[4, 2\]"),
    ({"lengths_q": (4, 3)}, r"equal lengths, total_q = 2 \* max_seqlen_q \(4\), got 7"),
    ({"lengths_k": (4, 3)}, r"equal lengths, total_k = 2 \* max_seqlen_k \(4\), got 7"),
    ({"lengths_k": (5, 5), "causal": True}, r"causal for as many queries as keys, got \[4, 5\]"),
]


def refuse(new_batch: Any, provider: str, case: dict[str, Any], message: str) -> None:
    batch = new_batch(**{"lengths_q": (4, 4), "dtype": BFLOAT16, "head_dim": 8} | case)
    with pytest.raises(ValueError, match=f"the provider {provider} .*{message}"):
        resolve("packed_attention", "cuda", provider)(batch.q, batch.k, batch.v, *batch.arguments())
    assert CALLS == []


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_what_neither_can(
    new_batch: Any, provider: str, case: dict[str, Any], message: str
) -> None:
    refuse(new_batch, provider, case, message)


@pytest.mark.parametrize("provider", ["cudnn"], indirect=True)
@pytest.mark.parametrize(("case", "message"), REFUSED_BY_CUDNN)
def test_what_cudnn_cannot(
    new_batch: Any, provider: str, case: dict[str, Any], message: str
) -> None:
    refuse(new_batch, provider, case, message)


def test_bad_lengths_never_reach_the_library(new_batch: Any, provider: str) -> None:
    batch = new_batch((4, 4), dtype=BFLOAT16, head_dim=8)
    starts_q, *rest = batch.arguments()
    op = resolve("packed_attention", "cuda", provider)
    with pytest.raises(ValueError, match="cu_seqlens_q must begin with 0 and end with"):
        op(batch.q, batch.k, batch.v, starts_q + 1, *rest)
    assert CALLS == []


@pytest.mark.parametrize(
    ("starts", "right"),
    [
        ((0, 4, 8), True),
        ((0, 4, 9), False),
        ((1, 4, 8), False),
        ((0, 9, 8), False),
        ((0, 8), False),
    ],
)
def test_lengths_on_the_device_are_asserted(starts: tuple[int, ...], right: bool) -> None:
    """What runs on CUDA, where nothing is read back; on the CPU the assertion is immediate."""
    given = torch.tensor(starts)
    if right:
        external._assert_lengths("q", given, 8, 4)
        return
    with pytest.raises(RuntimeError, match="cu_seqlens_q must run from 0 to 8"):
        external._assert_lengths("q", given, 8, 4)


@pytest.mark.parametrize(
    ("version", "provider", "message"),
    [
        (None, "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("2.5.9", "flash_attn", r"needs flash-attn 2\.6 or later, found 2\.5\.9"),
        (None, "cudnn", "needs a CUDA build of torch"),
    ],
)
def test_missing_library_says_how_to_install(
    installed: pytest.MonkeyPatch, version: str | None, provider: str, message: str
) -> None:
    if version is not None:
        install(installed, "flash_attn", flash_2, version)
    with pytest.raises(ProviderError, match=message):
        resolve("packed_attention", "cuda", provider)


def test_padded_lse_of_an_old_library_is_refused(installed: Any, new_batch: Any) -> None:
    def padded(*arguments: Any, **options: Any) -> Any:
        out, lse, rest = flash_2(*arguments, **options)
        return out, lse.unflatten(1, (2, 4)).transpose(0, 1), rest

    padded.__signature__ = inspect.signature(flash_2)  # type: ignore[attr-defined]
    install(installed, "flash_attn", padded, "2.6.0")
    batch = new_batch((4, 4), dtype=BFLOAT16, head_dim=8)
    op = resolve("packed_attention", "cuda", "flash_attn")
    with pytest.raises(ProviderError, match=r"lse of the shape \[2, 2, 4\]"):
        op(batch.q, batch.k, batch.v, *batch.arguments())


def test_both_versions_three_is_preferred(installed: Any, new_batch: Any) -> None:
    install(installed, "flash_attn", flash_2, "2.8.3")
    install(installed, "flash_attn_interface", flash_3)
    assert_right(new_batch((4, 4), dtype=BFLOAT16, head_dim=8), "flash_attn")
    assert CALLS == ["3"]


def test_stand_in_has_torchs_signature() -> None:
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    mine: Callable[..., Any] = cudnn
    assert [x.name for x in schema.arguments] == list(inspect.signature(mine).parameters)
    assert len(schema.returns) == 9

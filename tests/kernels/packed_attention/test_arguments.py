"""packed_attention refuses what it cannot compute, in the same words whoever computes it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from carillon.kernels.table import load_triton, resolve

pytestmark = pytest.mark.op("packed_attention")


def starts(*values: int) -> Tensor:
    return torch.tensor(values)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    """Two sequences, of 3 and 4 queries and 2 and 4 keys, with some arguments changed."""
    return {
        "q": zeros(7, 4, 16),
        "k": zeros(6, 2, 16),
        "v": zeros(6, 2, 16),
        "cu_seqlens_q": starts(0, 3, 7),
        "cu_seqlens_k": starts(0, 2, 6),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
        "causal": False,
        "prefix_lengths": None,
        "scale": None,
    } | changed


BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": zeros(7, 4, 16, dtype=torch.float16)}, "q must be float32 or bfloat16, got"),
    ({"k": zeros(6, 2, 16, dtype=torch.bfloat16)}, "k and v must have q's dtype, got"),
    ({"v": zeros(6, 2, 16, dtype=torch.bfloat16)}, "k and v must have q's dtype, got"),
    ({"q": zeros(7, 64)}, r"q must have the shape \(total_q, num_heads, head_dim\), got \[7, 64\]"),
    ({"k": zeros(6, 32)}, r"one shape \(total_k, num_kv_heads, head_dim\), got \[6, 32\]"),
    ({"v": zeros(5, 2, 16)}, r"one shape .*, got \[6, 2, 16\] and \[5, 2, 16\]"),
    ({"q": zeros(7, 4, 8)}, "the same for q and k, got 8 and 16"),
    (
        {name: zeros(n, 2, 12) for name, n in (("q", 7), ("k", 6), ("v", 6))},
        "head_dim must be a multiple of 8 from 8 to 256, .*, got 12 and 12",
    ),
    ({name: zeros(n, 2, 264) for name, n in (("q", 7), ("k", 6), ("v", 6))}, "got 264 and 264"),
    ({name: zeros(n, 2, 0) for name, n in (("q", 7), ("k", 6), ("v", 6))}, "got 0 and 0"),
    ({"q": zeros(7, 3, 16)}, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
    ({"k": zeros(6, 0, 16), "v": zeros(6, 0, 16)}, "num_kv_heads, got 4 and 0"),
    ({"cu_seqlens_q": starts(0, 3, 7).float()}, "cu_seqlens_q must be int32 or int64 of the shape"),
    ({"cu_seqlens_k": starts(0, 2, 6)[None]}, "cu_seqlens_k must be int32 or int64 of the shape"),
    ({"cu_seqlens_k": starts()}, "cu_seqlens_k must be int32 or int64 of the shape"),
    ({"cu_seqlens_q": starts(0, 7)}, "must be equally long, got 2 and 3"),
    ({"prefix_lengths": starts(1, 1)}, "pass causal=True, got False"),
    ({"prefix_lengths": starts(1), "causal": True}, r"of the shape \(num_sequences,\), .*\[1\]"),
    ({"prefix_lengths": starts(1, 1).float(), "causal": True}, "prefix_lengths must be int32 or"),
    ({"scale": float("inf")}, "scale must be finite, got inf"),
    ({"scale": float("nan")}, "scale must be finite, got nan"),
]


# What is seen by reading the lengths alone.
BAD_LENGTHS: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens_q": starts(1, 3, 7)}, "must begin with 0 and end with total_q = 7, got 1 and 7"),
    ({"cu_seqlens_k": starts(0, 2, 7)}, "must begin with 0 and end with total_k = 6, got 0 and 7"),
    (
        {"cu_seqlens_q": starts(0, 9, 7), "max_seqlen_q": 9},
        "cu_seqlens_q must not decrease, got 9 then 7 at 1",
    ),
    ({"cu_seqlens_k": starts(0, -2, 6)}, "cu_seqlens_k must not decrease, got 0 then -2 at 0"),
    ({"max_seqlen_q": 3}, "max_seqlen_q must be at least .*, got 3 where sequence 1 has 4"),
    ({"max_seqlen_k": -1}, "max_seqlen_k must be at least .*, got -1 where sequence 0 has 2"),
    ({"prefix_lengths": starts(3, 1), "causal": True}, "got 3 for sequence 0 with 2 keys"),
    ({"prefix_lengths": starts(0, -1), "causal": True}, "got -1 for sequence 1 with 4 keys"),
]


def on(device: str, given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def assert_refused(provider: str, device: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"packed_attention: .*{message}"):
        resolve("packed_attention", device, provider)(*given.values())
    q, k, v, *rest = given.values()
    backward = resolve("packed_attention_backward", device, provider)
    results = [x.to(device) for x in (zeros(7, 4, 16), zeros(4, 7))]
    with pytest.raises(ValueError, match=f"packed_attention: .*{message}"):
        backward(results[0], None, q, k, v, *results, *rest)


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_arguments(provider: str, device: str, changed: dict[str, Any], message: str) -> None:
    assert_refused(provider, device, on(device, arguments(**changed)), message)


@pytest.mark.parametrize(("changed", "message"), BAD_LENGTHS)
def test_bad_lengths(provider: str, device: str, changed: dict[str, Any], message: str) -> None:
    """Triton does not wait for a GPU to read them there: it gives their sequences NaN."""
    given = on(device, arguments(**changed))
    if (provider, device) == ("triton", "cuda"):
        _, lse = resolve("packed_attention", device, provider)(*given.values())
        assert lse.isnan().any()
    else:
        assert_refused(provider, device, given, message)


@pytest.mark.parametrize("name", ["k", "v", "cu_seqlens_q", "cu_seqlens_k", "prefix_lengths"])
def test_other_device_is_named(name: str) -> None:
    """By the reference; the dispatcher hands no provider of the CPU a meta tensor."""
    given = arguments(prefix_lengths=starts(0, 0), causal=True)
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on q's device cpu, got meta"):
        resolve("packed_attention", "cpu", "reference")(*given.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_out": zeros(7, 4, 8)}, r"grad_out must have q's shape \[7, 4, 16\]"),
        ({"grad_out": zeros(7, 4, 16, dtype=torch.bfloat16)}, "grad_out must have q's shape"),
        ({"out": zeros(6, 4, 16)}, r"out must have q's shape .*, got \[6, 4, 16\]"),
        ({"grad_lse": zeros(7, 4)}, r"grad_lse must be float32 of the shape .* = \[4, 7\]"),
        ({"lse": zeros(4, 7, dtype=torch.float64)}, "lse must be float32 of the shape"),
    ],
)
def test_bad_gradients(provider: str, device: str, changed: dict[str, Any], message: str) -> None:
    given = {"grad_out": zeros(7, 4, 16), "grad_lse": None} | arguments()
    results = {"out": zeros(7, 4, 16), "lse": zeros(4, 7)}
    names = ["grad_out", "grad_lse", "q", "k", "v", "out", "lse"]
    values = on(device, given | results | changed)
    names += [name for name in given if name not in names]
    with pytest.raises(ValueError, match=message):
        resolve("packed_attention_backward", device, provider)(*(values[name] for name in names))


@pytest.mark.parametrize(
    ("given", "longest", "lost"),
    [
        ((0, 3, 7), 0, range(7)),
        ((0,), 5, range(7)),
        ((0, 3), 3, range(7)),
        ((1, 3, 7), 4, range(3)),
        ((0, 3, 7), 3, range(3, 7)),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted")
def test_lengths_that_are_not_read_leave_nan(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int, ...], longest: int, lost: range
) -> None:
    """As on a GPU, which is not asked for values: a row is right or NaN, never old memory."""
    load_triton()
    from carillon.kernels.packed_attention import triton_impl

    monkeypatch.setattr(triton_impl, "check_values", lambda *arguments: None)
    q, k, v = (torch.randn(7, 1, 32) for _ in range(3))
    cu = starts(*given).int()
    out, lse = triton_impl.packed_attention(q, k, v, cu, cu, longest, longest)
    grads = triton_impl.packed_attention_backward(
        torch.ones_like(out), None, q, k, v, out, lse, cu, cu, longest, longest
    )
    for rows in (out.flatten(1), lse.t(), *(grad.flatten(1) for grad in grads)):
        assert rows.isnan().all(1).nonzero()[:, 0].tolist() == list(lost)
        assert rows.isnan().any(1).sum() == len(lost)

"""Attention against its textbook definition in float64, values and gradients."""

import pytest
import torch
from torch import Tensor

from carillon.engine.nn.attention import AttentionPool, SelfAttention, attend, take_token
from carillon.engine.nn.norm import LayerNorm

# fp32 sums of at most 96 terms of size 1: a few hundred units in the last place of fp32 (6e-8).
FP32 = 1e-5


def split_heads(module: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, H, L, K), read row by row from the fused weight's (head, q|k|v, K) order."""
    heads = x.shape[-1] // module.head_dim
    weight = module.qkv.weight.double().view(heads, 3, module.head_dim, -1)
    bias = module.qkv.bias.double().view(heads, 3, module.head_dim)
    parts = [
        torch.einsum("bld,hkd->bhlk", x, weight[:, part]) + bias[:, part][None, :, None]
        for part in range(3)
    ]
    return parts[0], parts[1], parts[2]


def normalised(x: Tensor, norm: LayerNorm | None) -> Tensor:
    if norm is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def plain_attention(module: SelfAttention, x: Tensor, visible: Tensor) -> Tensor:
    q, k, v = split_heads(module, x)
    q, k = normalised(q, module.q_norm), normalised(k, module.k_norm)
    scores = torch.einsum("bhqk,bhsk->bhqs", q, k) / module.head_dim**0.5
    weights = scores.masked_fill(~visible, float("-inf")).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bhqs,bhsk->bqhk", weights, v).flatten(2)
    return y @ module.out.weight.double().T + module.out.bias.double()


def gradients(module: torch.nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    seed = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *module.parameters()], seed))


def assert_same(got: list[Tensor], want: list[Tensor], bound: float) -> None:
    total = torch.cat([tensor.flatten() for tensor in want]).norm()
    for left, right in zip(got, want, strict=True):
        error = (left.double() - right.double()).norm() / max(right.norm(), 1e-3 * total)
        assert error < bound


def built(width: int, heads: int, **options: bool) -> SelfAttention:
    module = SelfAttention(width, heads, **options)
    module.init_weights(qkv_std=0.3, out_std=0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # biases and gains at their initial values would hide a wrong order
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return module


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masking", ["none", "causal", "keys"])
@pytest.mark.parametrize(("length", "heads"), [(1, 1), (7, 3), (33, 2)])
def test_matches_the_definition(length: int, heads: int, masking: str, qk_norm: bool) -> None:
    module = built(24, heads, causal=masking == "causal", qk_norm=qk_norm)
    x = torch.randn(3, length, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    visible = torch.ones(length, length, dtype=torch.bool)[None, None]
    mask = None
    if masking == "causal":
        visible = visible.tril()
    if masking == "keys":
        lengths = torch.tensor([1, max(1, length // 2), length])
        mask = visible = (torch.arange(length) < lengths[:, None])[:, None, None]
    got, want = module(x, mask), plain_attention(module, x.double(), visible)
    assert (got - want).abs().max() < FP32
    assert_same(gradients(module, x, got), gradients(module, x, want), FP32)


@pytest.mark.parametrize("causal", [False, True])
def test_one_token_is_the_row_of_all(causal: bool) -> None:
    module = built(24, 3, causal=causal, qk_norm=True)
    x = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    index = torch.tensor([8, 0, 4])
    mask = (torch.arange(9) <= index[:, None])[:, None, None] if causal else None
    got, want = module(x, mask, index), take_token(module(x), index)
    assert got.shape == (3, 1, 24)
    assert (got - want).abs().max() < FP32
    assert_same(gradients(module, x, got), gradients(module, x, want), FP32)


def test_split_of_dim_0_gives_whole_heads() -> None:
    module = built(24, 4)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    total = module.out.bias
    for rank in range(2):
        half = SelfAttention(24, 4)
        half.qkv.weight = torch.nn.Parameter(module.qkv.weight.chunk(2)[rank])
        half.qkv.bias = torch.nn.Parameter(module.qkv.bias.chunk(2)[rank])
        half.out.weight = torch.nn.Parameter(module.out.weight.chunk(2, dim=1)[rank])
        half.out.bias = torch.nn.Parameter(torch.zeros(24))
        total = total + half(x)
    assert (total - module(x)).abs().max() < FP32


def test_reads_non_contiguous_input() -> None:
    module = built(24, 3)
    x = torch.randn(7, 3, 24, generator=torch.Generator().manual_seed(2)).transpose(0, 1)
    assert torch.equal(module(x), module(x.contiguous()))


def test_attention_pool_matches_the_definition() -> None:
    pool = AttentionPool(24, 3, 40, "gelu")
    pool.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        pool.kv.bias.add_(torch.linspace(-1, 1, 48))
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(4), requires_grad=True)

    plain = pool.double()
    wide = x.double()
    q = (plain.probe @ plain.q.weight.T + plain.q.bias).view(3, 8)
    kv = (wide @ plain.kv.weight.T + plain.kv.bias).view(2, 5, 3, 2, 8)
    weights = (torch.einsum("hk,bshk->bhs", q, kv[..., 0, :]) / 8**0.5).softmax(-1)
    y = torch.einsum("bhs,bshk->bhk", weights, kv[..., 1, :]).flatten(1)
    y = y @ plain.out.weight.T + plain.out.bias
    want = y + plain.mlp(plain.norm(y))
    wanted = [tensor.clone() for tensor in gradients(plain, x, want)]

    got = pool.float()(x)
    assert (got - want).abs().max() < FP32
    assert_same(gradients(pool, x, got), wanted, FP32)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_written_out_bf16_equals_the_fused_operator(causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(3, 2, 9, 16, generator=generator) for _ in range(3)]
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    given = mask[:, None, None] if masked else None
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (part.to(torch.bfloat16).to(dtype).requires_grad_() for part in parts)
        out = attend(q, k, v, given, causal=causal)
        out.backward(torch.ones_like(out))
        results.append([out, q.grad, k.grad, v.grad])
    for ours, exact in zip(*results, strict=True):
        # bf16 keeps 8 bits: a few roundings of values up to about 1.
        assert torch.allclose(ours.double(), exact, atol=4e-2, rtol=4e-2)

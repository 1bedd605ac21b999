"""The stack: blocks by their formula, the pooled last block, recompute, initial statistics."""

import pytest
import torch
from torch import Tensor, nn

from carillon.engine.nn.transformer import Block, BlockShape, Transformer

# fp32 sums of at most 96 terms of size 1 through 3 blocks.
FP32 = 1e-5


def shape(*, causal: bool = False, width: int = 24, heads: int = 3) -> BlockShape:
    return BlockShape(
        width=width,
        num_heads=heads,
        mlp_width=4 * width,
        activation="gelu",
        qk_norm=False,
        causal=causal,
    )


def built(*, causal: bool = False) -> Transformer:
    stack = Transformer(shape(causal=causal), 3)
    stack.init_weights(torch.Generator().manual_seed(1))
    return stack


def tokens(*, length: int = 7) -> Tensor:
    x = torch.randn(3, length, 24, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(y, [x, *module.parameters()], seed.to(y.dtype)))


def test_block_is_its_formula_in_float64() -> None:
    block = built().blocks[0]
    assert isinstance(block, Block)
    x = tokens()
    got = block(x)
    got_gradients = gradients(block, x, got)
    block.double()
    wide = x.detach().double().requires_grad_()
    qkv = (block.norm1(wide) @ block.attention.qkv.weight.T).view(3, 7, 3, 3, 8)
    q, k, v = qkv.unbind(3)
    weights = (torch.einsum("bqhk,bshk->bhqs", q, k) / 8**0.5).softmax(-1)
    attended = torch.einsum("bhqs,bshk->bqhk", weights, v).flatten(2)
    middle = wide + attended @ block.attention.out.weight.T
    hidden = torch.nn.functional.gelu(block.norm2(middle) @ block.mlp.fc1.weight.T)
    want = middle + hidden @ block.mlp.fc2.weight.T
    assert (got - want).abs().max() < FP32
    matmuls = [p for p in block.parameters() if p.ndim == 2]
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).double()
    wanted = torch.autograd.grad(want, [wide, *matmuls], seed)
    kept = [got_gradients[0], *(g for g in got_gradients[1:] if g.ndim == 2)]
    for left, right in zip(kept, wanted, strict=True):
        assert (left - right).norm() < FP32 * right.norm()


@pytest.mark.parametrize("causal", [False, True])
def test_pool_token_gives_the_same_values_and_gradients(causal: bool) -> None:
    stack, x = built(causal=causal), tokens()
    lengths = torch.tensor([7, 1, 4])
    keys = (torch.arange(7) < lengths[:, None])[:, None, None]
    mask = None if causal else keys
    got = stack(x, mask, pool_token=lengths - 1, pool_mask=keys)
    want = stack(x, mask)[torch.arange(3), lengths - 1][:, None]
    assert (got - want).abs().max() < FP32
    wanted = gradients(stack, x, want)
    total = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    for left, right in zip(gradients(stack, x, got), wanted, strict=True):
        assert (left - right).norm() < FP32 * max(right.norm(), 1e-3 * total)


@pytest.mark.parametrize("pool_token", [None, 0])
def test_recompute_gives_the_same_gradients_and_keeps_less(pool_token: int | None) -> None:
    stack, x = built(), tokens()
    kept: list[int] = []

    def run(recompute: bool) -> list[Tensor]:
        stack.activation_recompute = recompute
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = stack(x, pool_token=pool_token)
        kept.append(sum(saved))
        return gradients(stack, x, y)

    plain, recomputed = run(False), run(True)
    assert all(torch.equal(left, right) for left, right in zip(plain, recomputed, strict=True))
    assert kept[1] < kept[0] / 5


def test_initial_statistics_are_the_published_ones() -> None:
    stack = Transformer(shape(width=192), 8)
    stack.init_weights(torch.Generator().manual_seed(4))
    block = stack.blocks[5]
    assert isinstance(block, Block)
    residual = 192**-0.5 * 16**-0.5
    for weight, std in (
        (block.attention.qkv.weight, 192**-0.5),
        (block.attention.out.weight, residual),
        (block.mlp.fc1.weight, 384**-0.5),
        (block.mlp.fc2.weight, residual),
    ):
        # 36,864 draws and more: the estimate of the deviation is within 2 % (5 sigma).
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5
    assert block.attention.qkv.bias.abs().max() == 0
    assert torch.equal(block.norm2.weight, torch.ones(192))

"""The ViT: convolution parity of the patches, pools, registers, positions, init."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carillon.engine.models.encoders.vision import (
    VisionConfig,
    VisionPool,
    VisionTransformer,
    patches,
)

# fp32 sums of at most 192 terms of size 1 through 2 blocks.
FP32 = 1e-5


def config(
    *,
    pool: VisionPool = "class",
    num_registers: int = 0,
    pre_norm: bool = True,
    patch_bias: bool = False,
    qk_norm: bool = False,
) -> VisionConfig:
    return VisionConfig(
        width=24,
        depth=2,
        num_heads=3,
        patch_size=8,
        mlp_width=96,
        image_size=24,
        pool=pool,
        num_registers=num_registers,
        pre_norm=pre_norm,
        patch_bias=patch_bias,
        qk_norm=qk_norm,
    )


def built(shape: VisionConfig) -> VisionTransformer:
    model = VisionTransformer(shape)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def plain_vit(model: VisionTransformer, pictures: Tensor) -> Tensor:
    """The published order of steps, on a convolution and without the shortcut of the last block."""
    shape = model.config
    kernel = model.patch.weight.view(shape.width, 3, shape.patch_size, shape.patch_size)
    x = F.conv2d(pictures, kernel, model.patch.bias, stride=shape.patch_size)
    x = x.flatten(2).transpose(1, 2)
    if model.class_token is not None:
        x = torch.cat([model.class_token.expand(len(x), 1, -1), x], dim=1)
    x = x + model.position
    if model.registers is not None:
        x = torch.cat([x, model.registers.expand(len(x), -1, -1)], dim=1)
    x = model.pre_norm(x) if model.pre_norm is not None else x
    for block in model.transformer.blocks:
        x = block(x)
    x = model.post_norm(x)
    if shape.pool == "class":
        return x[:, 0]
    x = x[:, : shape.num_patches]
    return x.mean(1) if model.pool is None else model.pool(x)


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_follows_the_published_steps(pool: VisionPool, num_registers: int) -> None:
    shape = config(
        pool=pool,
        num_registers=num_registers,
        pre_norm=num_registers == 0,
        patch_bias=num_registers > 0,
        qk_norm=num_registers > 0,
    )
    model, pictures = built(shape), images()
    got, want = model(pictures), plain_vit(model, pictures)
    assert (got - want).abs().max() < FP32
    # Weighted: a plain sum of a normalised vector is constant, its gradient nothing but rounding.
    weights = torch.linspace(-1, 1, 24)
    wanted = torch.autograd.grad((want * weights).sum(), list(model.parameters()))
    found = torch.autograd.grad((got * weights).sum(), list(model.parameters()))
    total = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    for left, right in zip(found, wanted, strict=True):
        assert (left - right).norm() < FP32 * max(right.norm(), 1e-3 * total)


def test_patches_run_row_by_row_over_channel_row_column() -> None:
    shape = config()
    numbered = torch.arange(3 * 24 * 24, dtype=torch.float32).view(1, 3, 24, 24)
    cut = patches(numbered, shape)
    assert cut.shape == (1, 9, 192)
    assert torch.equal(cut[0, 5], numbered[0, :, 8:16, 16:24].flatten())


def test_channels_last_input_gives_the_same() -> None:
    model, pictures = built(config()), images()
    assert torch.equal(model(pictures.to(memory_format=torch.channels_last)), model(pictures))


def test_picture_does_not_see_its_batch() -> None:
    model, pictures = built(config(pool="mean")), images(5)
    assert (model(pictures)[3] - model(pictures[3:4])[0]).abs().max() < FP32


def test_registers_change_the_answer_and_have_gradients() -> None:
    model, pictures = built(config(num_registers=2)), images()
    assert model.registers is not None
    before = model(pictures)
    (before * torch.linspace(-1, 1, 24)).sum().backward()
    assert model.registers.grad is not None
    assert model.registers.grad.norm(dim=-1).min() > 0
    with torch.no_grad():
        model.registers.mul_(-1)
    assert (model(pictures) - before).abs().max() > 1e-3


def test_only_the_class_pool_has_a_class_token() -> None:
    assert config().num_tokens == 10
    assert config(pool="mean", num_registers=2).num_tokens == 11
    assert built(config(pool="mean")).class_token is None


def test_position_and_patch_statistics_are_the_published_ones() -> None:
    shape = VisionConfig(width=192, depth=1, num_heads=3, patch_size=8, mlp_width=768)
    model = built(shape)
    # 150,000 and 36,864 draws: within 2 % of the deviation (5 sigma).
    assert model.position.std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert model.patch.weight.std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.02)
    assert model.patch.weight.abs().max().item() <= 192**-0.5


def test_other_picture_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) given.*\(batch, 3, 24, 24\)"):
        built(config())(torch.zeros(1, 3, 32, 32))


def test_check_names_what_does_not_fit() -> None:
    shape = VisionConfig(
        width=100, depth=1, num_heads=3, patch_size=14, mlp_width=400, image_size=64
    )
    problems = list(shape.check())
    assert problems == [
        "width 100 is not a multiple of num_heads 3",
        "image_size 64 is not a multiple of patch_size 14; take 70",
    ]

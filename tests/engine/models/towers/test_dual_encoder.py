"""The dual encoder: published sizes, features, determinism, recompute, FLOPs, config checks."""

import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from carillon.engine.config import UserError, build
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import (
    CLIP_LOGIT_SCALE,
    DualEncoder,
    DualEncoderConfig,
    DualFeatures,
    build_dual_encoder,
    count_parameters,
)

LENGTHS = torch.tensor([8, 3, 5])


def small(**changes: Any) -> DualEncoderConfig:
    values: dict[str, Any] = {
        "dims": 16,
        "vision_backbone": "vit-ti-8",
        "vision": {"image_size": 16, "width": 24, "num_heads": 3, "depth": 2},
        "text_backbone": "clip-text-ti",
        "text": {"context": 8, "width": 24, "num_heads": 3, "depth": 2},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return build(DualEncoderConfig, values)


def built(config: DualEncoderConfig | None = None, **options: Any) -> DualEncoder:
    generator = torch.Generator().manual_seed(1)
    return build_dual_encoder(config or small(), vocab_size=50, generator=generator, **options)


def run(model: DualEncoder) -> DualFeatures:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randn(3, 3, 16, 16, generator=generator)
    features: DualFeatures = model(
        pictures, torch.randint(50, (3, 8), generator=generator), LENGTHS
    )
    return features


@pytest.mark.parametrize(
    ("vision", "text", "dims", "published"),
    [
        ("vit-b-32", "clip-text-b", 512, 151_277_313),
        ("vit-b-16", "clip-text-b", 512, 149_620_737),
        ("vit-l-14", "clip-text-l", 768, 427_616_513),
    ],
)
def test_parameter_counts_are_the_published_ones(
    vision: str, text: str, dims: int, published: int
) -> None:
    config = DualEncoderConfig(vision_backbone=vision, text_backbone=text, dims=dims)
    model = build_dual_encoder(config, vocab_size=49_408, device="meta")
    assert count_parameters(model) == published


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("bf16", [False, True])
def test_features_are_unit_norm_fp32(projection: str, bf16: bool) -> None:
    model = built(small(projection=projection))
    reference = run(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = run(model)
    for got, want in ((features.image, reference.image), (features.text, reference.text)):
        assert got.dtype == torch.float32
        assert got.shape == (3, 16)
        assert (got.norm(dim=-1) - 1).abs().max() < 1e-6  # fp32 rounding of 16 squares
        # bf16 keeps 8 bits: 0.4 % a step, through 2 blocks and two norms.
        assert (got - want).abs().max() < (0.05 if bf16 else 1e-6)


def test_scale_starts_as_published_and_is_clamped_to_100() -> None:
    model = built()
    assert run(model).scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert run(model).bias is None
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_scale_()
    assert run(model).scale.item() == pytest.approx(100, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(-1.0)
    model.clamp_scale_()
    assert run(model).scale.item() == 1


def test_sigmoid_loss_has_a_bias() -> None:
    model = built(init_logit_scale=math.log(10), init_bias=-10.0)
    features = run(model)
    assert features.bias is not None
    assert features.bias.tolist() == [-10]
    assert features.scale.item() == pytest.approx(10, rel=1e-6)


def test_every_parameter_has_a_dim_and_the_names_without_decay() -> None:
    model = built(init_bias=-10.0)
    assert min(value.ndim for value in model.parameters()) == 1
    names = model.no_decay_names()
    assert {"logit_scale", "logit_bias", "vision.class_token", "text.post_norm.weight"} <= names
    assert not [name for name in names if name.endswith(("patch.weight", "position", "fc1.weight"))]
    assert all(name in names for name, _ in model.named_parameters() if name.endswith("bias"))


def test_weights_follow_from_the_seed_alone() -> None:
    left, right = built().state_dict(), built().state_dict()
    torch.manual_seed(1)
    unseeded = build_dual_encoder(small(), vocab_size=50).state_dict()
    for name, value in left.items():
        assert torch.equal(value, right[name])
        assert torch.equal(value, unseeded[name])
        assert value.isfinite().all()
    other = build_dual_encoder(
        small(), vocab_size=50, generator=torch.Generator().manual_seed(2)
    ).state_dict()
    assert not torch.equal(left["text.token.weight"], other["text.token.weight"])


def test_recompute_gives_identical_gradients() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = built(small(vision={"pool": "mean"}))
        model.set_recompute(recompute)
        features = run(model)
        loss = (features.scale * features.image @ features.text.T).logsumexp(1).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for left, right in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(left, right)


def test_blocks_are_both_towers_in_order() -> None:
    model = built(small(vision={"depth": 3}))
    assert list(model.blocks()) == [
        *model.vision.transformer.blocks,
        *model.text.transformer.blocks,
    ]
    assert len(list(model.blocks())) == 5


@pytest.mark.parametrize(
    ("changes", "once_per_batch"),
    [
        ({}, 0),
        # The learned query of the pool is projected once for the whole batch.
        ({"vision": {"pool": "attention", "num_registers": 2}, "projection": "mlp"}, 2 * 24 * 24),
        ({"vision": {"pool": "mean"}, "text_backbone": "bertlike-encoder-ti"}, 0),
    ],
)
def test_flops_are_those_that_torch_counts(changes: dict[str, Any], once_per_batch: int) -> None:
    model = built(small(**changes))
    # Attention as two plain products: the counter misses the CPU's fused op.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(model)
    per_sample = model.flops_per_sample(image_size=16, text_length=8)
    assert counter.get_total_flops() == 3 * per_sample + once_per_batch


def test_real_config_checks_name_the_field() -> None:
    with pytest.raises(UserError, match=r"vision.image_size 65 is not a multiple of patch_size 8"):
        small(vision={"image_size": 65})
    with pytest.raises(UserError, match=r"vision_backbone: 'vit-t-8'.*did you mean vit-ti-8"):
        small(vision_backbone="vit-t-8")
    with pytest.raises(UserError, match=r"text.width 25 is not a multiple of num_heads 3"):
        small(text={"width": 25})
    with pytest.raises(UserError, match=r"model: vision.width 25"):
        built(DualEncoderConfig(vision=VisionOverrides(width=25), text=TextOverrides()))


def test_published_logit_scale() -> None:
    assert pytest.approx(2.6592600) == CLIP_LOGIT_SCALE


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dims": 10**12}, "dims: 1000000000000 .* at most 65536"),
        ({"vision": {"depth": 10**9}}, "vision.depth: .* at most 1024"),
        ({"vision": {"image_size": 10**9}}, "vision.image_size: .* at most 16384"),
        ({"text": {"context": 10**12}}, "text.context: .* at most 131072"),
        ({"text": {"mlp_width": 10**20}}, "text.mlp_width: .* at most 524288"),
    ],
)
def test_sizes_beyond_any_model_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        small(**values)

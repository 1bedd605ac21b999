"""Backbones by name and what overrides make of them."""

import pytest

from carillon.engine.config import UserError
from carillon.engine.models.catalog import (
    TEXT_BACKBONES,
    VISION_BACKBONES,
    text_config,
    vision_config,
)
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides


def test_every_size_and_patch_has_a_name() -> None:
    names = {f"vit-{size}-{patch}" for size in ("ti", *"sblh") for patch in (8, 14, 16, 32)}
    assert set(VISION_BACKBONES) == names
    shape = VISION_BACKBONES["vit-h-14"]
    assert (shape.width, shape.depth, shape.num_heads, shape.mlp_width) == (1280, 32, 16, 5120)
    assert shape.num_patches == 256


def test_every_backbone_passes_its_own_check() -> None:
    for vision in VISION_BACKBONES.values():
        assert not [text for text in vision.check() if "image_size" not in text]
    assert not [text for config in TEXT_BACKBONES.values() for text in config.check()]


def test_overrides_replace_only_what_is_given() -> None:
    overrides = VisionOverrides(image_size=64, depth=6, qk_norm=True, num_registers=0)
    shape = vision_config("vit-ti-8", overrides)
    assert (shape.image_size, shape.depth, shape.qk_norm) == (64, 6, True)
    assert (shape.width, shape.num_heads, shape.patch_size, shape.pool) == (192, 3, 8, "class")
    text = text_config("bertlike-encoder-large", TextOverrides(context=128))
    assert (text.context, text.causal, text.pool, text.width) == (128, False, "mean", 1024)


def test_mlp_follows_an_overridden_width_unless_given() -> None:
    assert vision_config("vit-s-16", VisionOverrides(width=96)).mlp_width == 384
    assert vision_config("vit-s-16", VisionOverrides(width=96, mlp_width=100)).mlp_width == 100


@pytest.mark.parametrize(
    ("name", "nearest"), [("vit-b32", "vit-b-32"), ("ViT_B_16", "vit-b-16"), ("vit-l-15", "vit-l-")]
)
def test_unknown_vision_backbone_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"vision_backbone: '{name}'.*did you mean {nearest}"):
        vision_config(name, VisionOverrides())


def test_unknown_text_backbone_names_the_nearest_or_all() -> None:
    with pytest.raises(UserError, match="did you mean clip-text-b"):
        text_config("clip-test-b", TextOverrides())
    with pytest.raises(UserError, match=r"allowed: clip-text-ti, .*bertlike-encoder-large"):
        text_config("gru", TextOverrides())

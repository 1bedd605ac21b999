"""Foreign configs: what they map to, and what is refused by name."""

from typing import Any

import pytest
import torch

from carillon.engine.config import UserError
from carillon.engine.models.foreign_config import (
    from_hugging_face,
    from_openclip,
    from_openclip_weights,
)

HF = {"model_type": "clip", "projection_dim": 768}
LARGE_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}


def test_hugging_face_config_with_and_without_its_defaults() -> None:
    shape = from_hugging_face(HF | {"vision_config": LARGE_VISION}, "config.json")
    assert (shape.vision.width, shape.vision.depth, shape.vision.num_patches) == (1024, 24, 576)
    assert (shape.text.width, shape.text.context, shape.text.activation) == (512, 77, "quick_gelu")
    assert (shape.vocab_size, shape.dims) == (49_408, 768)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip' given, allowed: clip"),
        ({"vision_config": {"hidden_act": "silu"}}, "activation 'silu' given"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        ({"vision_config": {"num_channels": 1}}, "num_channels 1"),
        ({"vision_config": {"num_attention_heads": 0}}, "vision num_heads 0 given"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text depth 1000000000 given"),
        ({"text_config": {"hidden_size": "512"}}, "text width '512' given"),
        ({"vision_config": {"image_size": 225}}, "image_size 225 is not a multiple"),
        ({"vision_config": [1]}, "is no CLIP config"),
        ({"text_config": {"hidden_act": ["gelu"]}}, "is no CLIP config"),
        ({"text_config": {"layer_norm_eps": "small"}}, "is no CLIP config"),
    ],
)
def test_hugging_face_config_is_checked(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"config.json:? {reason}"):
        from_hugging_face(HF | change, "config.json")


def openclip(**vision: Any) -> dict[str, Any]:
    return {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {}}


def test_openclip_config_of_vit_h() -> None:
    config = openclip(layers=32, width=1280, head_width=80, patch_size=14, image_size=[224, 224])
    shape = from_openclip({"model_cfg": config}, "open_clip_config.json")
    assert (shape.vision.num_heads, shape.vision.num_patches) == (16, 256)
    assert shape.vision.activation == shape.text.activation == "gelu"
    assert from_openclip(config | {"quick_gelu": True}, "x").vision.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"timm_model_name": "vit"}, "not supported: timm_model_name='vit'"),
        ({"pool_type": "avg"}, "not supported: pool_type='avg'"),
        ({"ls_init_value": 0.1}, "not supported: ls_init_value=0.1"),
        ({"attentional_pool": True}, "not supported: attentional_pool=True"),
        ({"head_width": 0}, "no OpenCLIP model config"),
        ({"image_size": [224, 256]}, "image_size"),
        ({"width": "wide"}, "no OpenCLIP model config"),
    ],
)
def test_openclip_config_is_checked(vision: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        from_openclip(openclip(**vision), "open_clip_config.json")


def test_openclip_config_without_its_sections() -> None:
    with pytest.raises(UserError, match=r"no OpenCLIP model config: KeyError\('vision_cfg'\)"):
        from_openclip({"embed_dim": 512}, "open_clip_config.json")


def test_shape_is_read_off_the_weights() -> None:
    block = "transformer.resblocks.0.mlp.c_fc.weight"
    shapes = {
        "visual.conv1.weight": (128, 3, 16, 16),
        "visual.positional_embedding": (50, 128),
        f"visual.{block}": (512, 128),
        "visual.transformer.resblocks.10.ln_1.bias": (128,),
        "visual.proj": (128, 32),
        "visual.ln_pre.weight": (128,),
        "positional_embedding": (20, 64),
        block: (256, 64),
        "token_embedding.weight": (99, 64),
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    shape = from_openclip_weights(weights, "quick_gelu", "x")
    assert (shape.vision.image_size, shape.vision.depth, shape.vision.num_heads) == (112, 2, 2)
    assert (shape.text.context, shape.text.depth, shape.text.mlp_width) == (20, 1, 256)
    assert (shape.vocab_size, shape.dims, shape.vision.pre_norm) == (99, 32, True)
    del weights["visual.proj"]
    with pytest.raises(UserError, match=r"the tensor 'visual.proj' of an OpenCLIP model"):
        from_openclip_weights(weights, "quick_gelu", "x")

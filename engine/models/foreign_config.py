"""The shape of a foreign CLIP: from Hugging Face's or OpenCLIP's config, or from the weights.

What a config asks for and this project does not have is refused by name, never ignored: a model
that loads gives the embeddings of its origin. Left out: towers from timm, and Hugging Face text
towers inside OpenCLIP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.models.encoders.text import TextConfig
from carillon.engine.models.encoders.vision import VisionConfig
from carillon.engine.nn.mlp import ACTIVATIONS, Activation


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    vision: VisionConfig
    text: TextConfig
    vocab_size: int
    dims: int


# What transformers assumes where config.json is silent (CLIPVisionConfig, CLIPTextConfig).
_HF_COMMON = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_HF_VISION = _HF_COMMON | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
_HF_TEXT = _HF_COMMON | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}


def from_hugging_face(config: Mapping[str, Any], source: str) -> ClipShape:
    """Map a config.json of model_type clip. Raises UserError for what cannot be represented."""
    if config.get("model_type") != "clip":
        raise UserError(f"{source}: model_type {config.get('model_type')!r} given, allowed: clip")
    try:
        return _hugging_face(config, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is no CLIP config of transformers: {error!r}") from None


def _hugging_face(config: Mapping[str, Any], source: str) -> ClipShape:
    vision = _HF_VISION | (config.get("vision_config") or {})
    text = _HF_TEXT | (config.get("text_config") or {})
    for tower in (vision, text):
        if not math.isclose(tower["layer_norm_eps"], 1e-5):
            raise UserError(f"{source}: layer_norm_eps {tower['layer_norm_eps']}, allowed: 1e-05")
    if vision["num_channels"] != 3:
        raise UserError(f"{source}: num_channels {vision['num_channels']}, allowed: 3")
    return _checked(
        ClipShape(
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                **_hf_blocks(vision, source),
            ),
            text=TextConfig(context=text["max_position_embeddings"], **_hf_blocks(text, source)),
            vocab_size=text["vocab_size"],
            dims=config.get("projection_dim", 512),
        ),
        source,
    )


def _hf_blocks(tower: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        "width": tower["hidden_size"],
        "depth": tower["num_hidden_layers"],
        "num_heads": tower["num_attention_heads"],
        "mlp_width": tower["intermediate_size"],
        "activation": activation_named(tower["hidden_act"], source),
    }


def activation_named(name: str, source: str) -> Activation:
    if name not in ACTIVATIONS:
        raise UserError(f"{source}: activation {name!r} given, allowed: {', '.join(ACTIVATIONS)}")
    return cast(Activation, name)


_OPENCLIP_VISION = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
_OPENCLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
# Without effect on an embedding: the tokenizer's own, and what acts in training only.
_OPENCLIP_NEUTRAL = {
    *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id", "eos_id"),
    *("patch_dropout", "output_tokens", "final_ln_after_pool", "timm_model_pretrained"),
    *("attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj", "hf_pooler_type"),
    *("hf_model_pretrained", "hf_proj_type", "timm_drop"),
}
_OPENCLIP_VALUES = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
}


def from_openclip(config: Mapping[str, Any], source: str) -> ClipShape:
    """Map an OpenCLIP model config, alone or inside open_clip_config.json.

    Raises UserError for what cannot be represented.
    """
    config = config.get("model_cfg", config)
    try:
        vision, text, dims = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
        problems = [*_unsupported(vision, _OPENCLIP_VISION), *_unsupported(text, _OPENCLIP_TEXT)]
        if problems:
            raise UserError(f"{source}: not supported: {', '.join(problems)}")
        quick = config.get("quick_gelu", False)
        activation: Activation = "quick_gelu" if quick else "gelu"
        return _checked(
            ClipShape(
                vision=_openclip_vision(vision, activation),
                text=_openclip_text(text, activation),
                vocab_size=text.get("vocab_size", 49408),
                dims=dims,
            ),
            source,
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{source} is no OpenCLIP model config: {error!r}") from None


def _openclip_vision(vision: Mapping[str, Any], activation: Activation) -> VisionConfig:
    width, size = vision.get("width", 768), vision.get("image_size", 224)
    if isinstance(size, list):
        size = size[0] if len(set(size)) == 1 else size
    return VisionConfig(
        width=width,
        depth=vision.get("layers", 12),
        num_heads=width // vision.get("head_width", 64),
        patch_size=vision.get("patch_size", 16),
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        image_size=size,
        activation=activation,
        pre_norm=not vision.get("no_ln_pre", False),
    )


def _openclip_text(text: Mapping[str, Any], activation: Activation) -> TextConfig:
    width = text.get("width", 512)
    return TextConfig(
        width=width,
        depth=text.get("layers", 12),
        num_heads=text.get("heads", 8),
        mlp_width=int(width * text.get("mlp_ratio", 4.0)),
        context=text.get("context_length", 77),
        activation=activation,
    )


def _unsupported(tower: Mapping[str, Any], supported: Iterable[str]) -> Iterator[str]:
    for key, value in tower.items():
        neutral = key in _OPENCLIP_NEUTRAL or key in supported or key == "no_ln_pre"
        if not neutral and value and value not in _OPENCLIP_VALUES.get(key, ()):
            yield f"{key}={value!r}"


def from_openclip_weights(
    weights: Mapping[str, Tensor], activation: Activation | None, source: str
) -> ClipShape:
    """Read an OpenCLIP model's shape off its weights (heads of 64, as all published ones but H).

    Raises UserError without an activation: the weights do not say it.
    """
    if activation is None:
        raise UserError(
            f"{source}: no config beside the weights, which do not say their activation; put"
            " open_clip_config.json there, or give activation: quick_gelu (OpenAI's) or gelu"
        )
    try:
        patch, position = weights["visual.conv1.weight"], weights["visual.positional_embedding"]
        vision_mlp = weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        text_position = weights["positional_embedding"]
        text_mlp = weights["transformer.resblocks.0.mlp.c_fc.weight"]
        vision = VisionConfig(
            width=patch.shape[0],
            depth=_count_blocks(weights, "visual.transformer.resblocks."),
            num_heads=patch.shape[0] // 64,
            patch_size=patch.shape[-1],
            mlp_width=vision_mlp.shape[0],
            image_size=math.isqrt(position.shape[0] - 1) * patch.shape[-1],
            activation=activation,
            pre_norm="visual.ln_pre.weight" in weights,
        )
        text = TextConfig(
            width=text_position.shape[1],
            depth=_count_blocks(weights, "transformer.resblocks."),
            num_heads=text_position.shape[1] // 64,
            mlp_width=text_mlp.shape[0],
            context=text_position.shape[0],
            activation=activation,
        )
        vocab_size = weights["token_embedding.weight"].shape[0]
        dims = weights["visual.proj"].shape[1]
    except KeyError as error:
        raise UserError(f"{source}: the tensor {error} of an OpenCLIP model is missing") from None
    return _checked(ClipShape(vision=vision, text=text, vocab_size=vocab_size, dims=dims), source)


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _bad_sizes(shape: ClipShape) -> Iterator[str]:
    names = ("width", "depth", "num_heads", "mlp_width", "patch_size", "image_size", "context")
    sizes: dict[str, Any] = {"vocab_size": shape.vocab_size, "dims": shape.dims}
    for tower, config in (("vision", shape.vision), ("text", shape.text)):
        values = vars(config)
        sizes |= {f"{tower} {name}": values[name] for name in names if name in values}
    for name, value in sizes.items():
        most = 1000 if name.endswith("depth") else 10_000_000
        if type(value) is not int or not 1 <= value <= most:
            yield f"{name} {value!r} given, a whole number from 1 to {most} is allowed"


def _checked(shape: ClipShape, source: str) -> ClipShape:
    problems = [*_bad_sizes(shape)] or [*shape.vision.check(), *shape.text.check()]
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}")
    return shape

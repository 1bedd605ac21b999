"""Backbones by name: published sizes, and what a user's overrides make of them.

Vision: "vit-{ti,s,b,l,h}-{8,14,16,32}". Text: "clip-text-*" is causal with end-of-text pooling, as
published with the CLIP of that size (ti and s are ours, for quick recipes); "bertlike-encoder-*" is
bidirectional with mean pooling. Left out: the tower's type, of which there is one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from carillon.engine.config import UserError
from carillon.engine.models.encoders.text import TextConfig, TextOverrides
from carillon.engine.models.encoders.vision import VisionConfig, VisionOverrides

C = TypeVar("C", VisionConfig, TextConfig)

# size -> width, depth, heads. Source: Dosovitskiy et al. 2021, table 1 (B, L, H); Touvron et al.
# 2021 (DeiT), table 1 (Ti, S).
_VISION_SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
_PATCH_SIZES = (8, 14, 16, 32)

# Source: Radford et al. 2021, table 20 (b: ViT-B/32 and B/16; l: ViT-L/14); OpenCLIP's ViT-H-14.
_CLIP_TEXT_SIZES = {
    "ti": (192, 4, 3),
    "s": (384, 6, 6),
    "b": (512, 12, 8),
    "l": (768, 12, 12),
    "h": (1024, 24, 16),
}
# Source: Devlin et al. 2019 (BERT), section 3 (base, large); 512 positions, appendix A.2.
_BERTLIKE_SIZES = {
    "ti": (192, 4, 3),
    "s": (384, 6, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def _vision_backbones() -> dict[str, VisionConfig]:
    return {
        f"vit-{size}-{patch}": VisionConfig(
            width=width, depth=depth, num_heads=heads, patch_size=patch, mlp_width=4 * width
        )
        for size, (width, depth, heads) in _VISION_SIZES.items()
        for patch in _PATCH_SIZES
    }


def _text_backbones() -> dict[str, TextConfig]:
    result: dict[str, TextConfig] = {}
    for size, (width, depth, heads) in _CLIP_TEXT_SIZES.items():
        result[f"clip-text-{size}"] = TextConfig(
            width=width, depth=depth, num_heads=heads, mlp_width=4 * width
        )
    for size, (width, depth, heads) in _BERTLIKE_SIZES.items():
        result[f"bertlike-encoder-{size}"] = TextConfig(
            width=width,
            depth=depth,
            num_heads=heads,
            mlp_width=4 * width,
            context=512,
            causal=False,
            pool="mean",
        )
    return result


VISION_BACKBONES: Mapping[str, VisionConfig] = _vision_backbones()
TEXT_BACKBONES: Mapping[str, TextConfig] = _text_backbones()


def vision_config(name: str, overrides: VisionOverrides) -> VisionConfig:
    """The named ViT with overrides applied. Raises UserError for an unknown name."""
    return _resolve(VISION_BACKBONES, "vision_backbone", name, overrides)


def text_config(name: str, overrides: TextOverrides) -> TextConfig:
    """The named text transformer with overrides applied. Raises UserError for an unknown name."""
    return _resolve(TEXT_BACKBONES, "text_backbone", name, overrides)


def _resolve(
    backbones: Mapping[str, C], setting: str, name: str, overrides: VisionOverrides | TextOverrides
) -> C:
    if name not in backbones:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), backbones, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(backbones)}"
        raise UserError(f"{setting}: {name!r} is no known backbone; {hint}")
    given: dict[str, Any] = {
        key: value for key, value in vars(overrides).items() if value is not None
    }
    if "width" in given and "mlp_width" not in given:
        given["mlp_width"] = 4 * given["width"]
    return dataclasses.replace(backbones[name], **given)

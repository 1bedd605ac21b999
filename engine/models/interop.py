"""Loads CLIP weights saved by Hugging Face transformers or by OpenCLIP into a DualEncoder.

A table says which foreign tensors make each of ours. Queries, keys and values are re-ordered into
the head-major rows that attention wants; everything else is renamed, flattened or transposed. Every
tensor on both sides must be accounted for. The tokens that go with such weights come from the
foreign tokenizer.json, and their lengths end at the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.models.foreign_config import (
    ClipShape,
    from_hugging_face,
    from_openclip,
    from_openclip_weights,
)
from carillon.engine.models.foreign_weights import read_json, read_weights
from carillon.engine.models.towers.dual_encoder import DualEncoder
from carillon.engine.nn.mlp import Activation


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one origin; `qkv` is one fused tensor or three."""

    tensors: Mapping[str, str]
    vision_block: str
    text_block: str
    block: Mapping[str, str]
    qkv: tuple[str, ...]
    ignored: tuple[str, ...]
    transposed: frozenset[str] = frozenset()


_HUGGING_FACE = Layout(
    tensors={
        "vision.class_token": "vision_model.embeddings.class_embedding",
        "vision.position": "vision_model.embeddings.position_embedding.weight",
        "vision.patch.weight": "vision_model.embeddings.patch_embedding.weight",
        # The spelling is theirs.
        "vision.pre_norm.": "vision_model.pre_layrnorm.",
        "vision.post_norm.": "vision_model.post_layernorm.",
        "vision_projection.weight": "visual_projection.weight",
        "text.token.weight": "text_model.embeddings.token_embedding.weight",
        "text.position": "text_model.embeddings.position_embedding.weight",
        "text.post_norm.": "text_model.final_layer_norm.",
        "text_projection.weight": "text_projection.weight",
        "logit_scale": "logit_scale",
    },
    vision_block="vision_model.encoder.layers.",
    text_block="text_model.encoder.layers.",
    block={
        "norm1.": "layer_norm1.",
        "attention.out.": "self_attn.out_proj.",
        "norm2.": "layer_norm2.",
        "mlp.fc1.": "mlp.fc1.",
        "mlp.fc2.": "mlp.fc2.",
    },
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    ignored=(
        "vision_model.embeddings.position_ids",
        "text_model.embeddings.position_ids",
    ),
)
_OPENCLIP = Layout(
    tensors={
        "vision.class_token": "visual.class_embedding",
        "vision.position": "visual.positional_embedding",
        "vision.patch.weight": "visual.conv1.weight",
        "vision.pre_norm.": "visual.ln_pre.",
        "vision.post_norm.": "visual.ln_post.",
        "vision_projection.weight": "visual.proj",
        "text.token.weight": "token_embedding.weight",
        "text.position": "positional_embedding",
        "text.post_norm.": "ln_final.",
        "text_projection.weight": "text_projection",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    },
    vision_block="visual.transformer.resblocks.",
    text_block="transformer.resblocks.",
    block={
        "norm1.": "ln_1.",
        "attention.out.": "attn.out_proj.",
        "norm2.": "ln_2.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    },
    qkv=("attn.in_proj_",),
    ignored=("attn_mask", "input_resolution", "context_length", "vocab_size"),
    transposed=frozenset({"vision_projection.weight", "text_projection.weight"}),
)


def load_clip(path: str | Path, *, activation: Activation | None = None) -> DualEncoder:
    """A DualEncoder in eval mode, fp32, from a folder (weights and config) or a weights file.

    `activation` is for OpenCLIP weights without a config beside them, and only for those.
    Raises UserError for pickled, damaged, missing or surplus weights and for configs that ask
    for what a DualEncoder does not have.
    """
    path = Path(path)
    weights = read_weights(path)
    folder = path if path.is_dir() else path.parent
    layout, shape = _recognise(weights, folder, activation, str(path))
    weights = {_plain_name(name): value for name, value in weights.items()}
    with torch.device("meta"):
        model = DualEncoder(
            shape.vision,
            shape.text,
            vocab_size=shape.vocab_size,
            dims=shape.dims,
            init_bias=0.0 if "logit_bias" in weights else None,
        )
    model.load_state_dict(_converted(model, weights, layout, str(path)), assign=True)
    return model.eval()


def _plain_name(name: str) -> str:
    # OpenCLIP's models with `custom_text` keep the same text tower under "text.".
    return name.removeprefix("text.")


def _recognise(
    weights: Mapping[str, Tensor], folder: Path, activation: Activation | None, source: str
) -> tuple[Layout, ClipShape]:
    if "vision_model.embeddings.patch_embedding.weight" in weights:
        config = folder / "config.json"
        return _HUGGING_FACE, from_hugging_face(read_json(config), str(config))
    if "visual.conv1.weight" in weights:
        config = folder / "open_clip_config.json"
        if config.is_file():
            return _OPENCLIP, from_openclip(read_json(config), str(config))
        plain = {_plain_name(name): value for name, value in weights.items()}
        return _OPENCLIP, from_openclip_weights(plain, activation, source)
    raise UserError(
        f"weights {source} are neither Hugging Face's CLIP nor an OpenCLIP ViT;"
        f" their tensors begin {_some(sorted(weights))}"
    )


def _converted(
    model: DualEncoder, weights: Mapping[str, Tensor], layout: Layout, source: str
) -> dict[str, Tensor]:
    wanted = dict(model.state_dict())
    origins = {name: tuple(_origins(name, layout)) for name in wanted}
    used = {origin for parts in origins.values() for origin in parts}
    missing = sorted(used - weights.keys())
    surplus = sorted(weights.keys() - used - set(layout.ignored))
    if missing or surplus:
        raise UserError(
            f"weights {source} do not fit their config: {len(missing)} missing ({_some(missing)}),"
            f" {len(surplus)} surplus ({_some(surplus)})"
        )
    result: dict[str, Tensor] = {}
    for name, target in wanted.items():
        parts = [weights[origin] for origin in origins[name]]
        value = _convert(name, parts, model, layout)
        if value is None or value.shape != target.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(
                f"weights {source} do not fit their config: {', '.join(origins[name])} of shape"
                f" {shapes} cannot become {name} of shape {tuple(target.shape)}"
            )
        # A copy: what was read is a view of the file, which may change under a running process.
        result[name] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return result


def _origins(name: str, layout: Layout) -> Iterator[str]:
    """The foreign tensors that make our `name`."""
    for tower, prefix in (("vision", layout.vision_block), ("text", layout.text_block)):
        ours = f"{tower}.transformer.blocks."
        if name.startswith(ours):
            index, rest = name[len(ours) :].split(".", 1)
            if rest.startswith("attention.qkv."):
                suffix = rest.removeprefix("attention.qkv.")
                yield from (f"{prefix}{index}.{part}{suffix}" for part in layout.qkv)
            else:
                yield f"{prefix}{index}.{_renamed(rest, layout.block)}"
            return
    yield _renamed(name, layout.tensors)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def _convert(name: str, parts: list[Tensor], model: DualEncoder, layout: Layout) -> Tensor | None:
    """Our tensor in its own shape, or None where the parts' shapes do not allow it."""
    if ".attention.qkv." in name:
        tower = model.vision if name.startswith("vision.") else model.text
        q_k_v = parts if len(parts) == 3 else list(parts[0].chunk(3))
        rows = {part.shape[:1] for part in q_k_v}
        return (
            fuse_heads(q_k_v, tower.config.num_heads) if rows == {(tower.config.width,)} else None
        )
    if name == "vision.patch.weight":
        return parts[0].flatten(1)
    if name in ("logit_scale", "logit_bias"):
        return parts[0].reshape(-1)
    return parts[0].T if name in layout.transposed else parts[0]


def fuse_heads(q_k_v: list[Tensor], num_heads: int) -> Tensor:
    """q, k and v rows, each (heads * head_dim, ...), as rows ordered (head, q|k|v, head_dim)."""
    by_head = [part.reshape(num_heads, -1, *part.shape[1:]) for part in q_k_v]
    return torch.stack(by_head, dim=1).flatten(0, 2)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "-"

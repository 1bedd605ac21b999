"""Tensor-parallel plans of the towers, and the sizes that decide which degrees fit.

The plan is Megatron's: in each block one sum after attention and one after the MLP. Source: Shoeybi
et al. 2019 (Megatron-LM), section 3. Rows of `qkv` are head-major, so a share is whole heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig
from carillon.engine.parallel.plan import Plan, Split

_BLOCK = {
    "attention.qkv": Split.COLUMNS,
    "attention.q_norm": Split.HEADS,
    "attention.k_norm": Split.HEADS,
    "attention.out": Split.ROWS,
    "mlp.fc1": Split.COLUMNS,
    "mlp.fc2": Split.ROWS,
}
DUAL_ENCODER: Plan = {
    **{
        f"{tower}.transformer.blocks.*.{name}": split
        for tower in ("vision", "text")
        for name, split in _BLOCK.items()
    },
    "text.token": Split.VOCABULARY,
    "vision.pool.q": Split.COLUMNS,
    "vision.pool.kv": Split.COLUMNS,
    "vision.pool.out": Split.ROWS,
    "vision.pool.mlp.fc1": Split.COLUMNS,
    "vision.pool.mlp.fc2": Split.ROWS,
}


def split_sizes(config: DualEncoderConfig) -> Iterator[tuple[str, int]]:
    """What a tensor-parallel degree must divide: its name and size."""
    vision = vision_config(config.vision_backbone, config.vision)
    text = text_config(config.text_backbone, config.text)
    for tower, sizes in (("vision", vision), ("text", text)):
        yield f"model.{tower}'s num_heads", sizes.num_heads
        yield f"model.{tower}'s mlp_width", sizes.mlp_width


def depths(config: DualEncoderConfig) -> dict[str, int]:
    """Blocks of each tower, which pipeline stages share out."""
    return {
        "vision": vision_config(config.vision_backbone, config.vision).depth,
        "text": text_config(config.text_backbone, config.text).depth,
    }

"""The dual encoder in the parity table: two of them, with every way to pool, mask and normalise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch

from carillon.engine.data.pairs import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.apply import LaidOut, apply_layout
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.train.parity.step import Kept, Run, Step, Variant, mean_over, measured
from carillon.engine.train.step import forward_backward

_TEXT = TextOverrides(context=12, width=32, depth=2, num_heads=4)
_VISION = VisionOverrides(image_size=16, width=32, depth=2, num_heads=4)
CLIP = DualEncoderConfig(
    dims=24,
    vision_backbone="vit-ti-8",
    vision=_VISION,
    text_backbone="clip-text-ti",
    text=_TEXT,
)
# The other way to pool, both kinds of mask, and every norm.
POOLED = DualEncoderConfig(
    dims=24,
    vision_backbone="vit-ti-8",
    vision=replace(_VISION, pool="attention", qk_norm=True),
    text_backbone="bertlike-encoder-ti",
    text=replace(_TEXT, qk_norm=True),
    projection="mlp",
)
_BATCH, _VOCABULARY, _SEED = 16, 50, 3


def dual_encoder(config: DualEncoderConfig, kind: Literal["softmax", "sigmoid"]) -> Run:
    """A dual encoder with one of the contrastive losses."""

    def run(
        layout: DistributedConfig | None, world: World | None, variant: Variant, depth: int
    ) -> Step:
        model: LaidOut = build_dual_encoder(
            replace(
                config,
                vision=replace(config.vision, depth=depth),
                text=replace(config.text, depth=depth),
            ),
            vocab_size=_VOCABULARY,
            init_bias=-3.0 if kind == "sigmoid" else None,
            generator=torch.Generator().manual_seed(1),
        )
        objective = ContrastiveObjective(ContrastiveConfig(kind=kind, exchange=variant.exchange))
        share, group = _BATCH, None
        local = pairs()
        if world is not None and layout is not None:
            assert isinstance(model, DualEncoder)
            model = apply_layout(model, layout, world)
            share, group = _BATCH // world.degrees.data, world.data_group
            local = local.microbatches(share)[world.data_rank].to(world.device)
        micro = share if layout is None else microbatch_size(layout, None, share)
        if variant.cached:
            micro = 3 if share > 4 else 1
        kept = Kept()
        with kept if variant == Variant() else nullcontext():
            loss = forward_backward(
                model, objective, local, micro, group=group, autocast=nullcontext
            )
        return measured(mean_over(loss, group), model, world, kept.num_bytes)

    return run


def pairs() -> Batch:
    generator = torch.Generator().manual_seed(_SEED)
    lengths = torch.randint(3, 13, (_BATCH,), generator=generator)
    return Batch(
        images=torch.randint(0, 256, (_BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, _VOCABULARY, (_BATCH, 12), generator=generator),
        lengths=lengths,
        keys=[str(i) for i in range(_BATCH)],
        languages=["en"] * _BATCH,
        bad=[],
    )

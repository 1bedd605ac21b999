"""The models that every layout is held to: the columns of the parity table.

Each is small, has every kind of module that its plans name, and takes one step of a fixed global
batch: in one process for the reference, and in a layout on a process's share of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from carillon.engine.data.loader import Batch
from carillon.engine.data.packed_rows import next_tokens, positions
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.losses.language import counted, language_loss
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.decoder import Decoder, build_decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.models.towers.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    build_dual_encoder,
)
from carillon.engine.parallel.apply import LaidOut, LaidOutDecoder, apply_layout
from carillon.engine.parallel.collectives import gradient_norm, sum_over, whole
from carillon.engine.parallel.mesh import DistributedConfig, World
from carillon.engine.parallel.pipeline import gather_named
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder, Rows
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.train.step import forward_backward

Exchange = Literal["gather", "ring"]
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
# Both kinds of block, grouped heads, and all terms of a router.
MIXED = DecoderConfig(
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=64,
    context=24,
    qk_norm=True,
    moe=MoeConfig(num_experts=4, expert_width=32, shared_experts=1, dense_blocks=1, z_loss=1e-3),
)
_BATCH, _VOCABULARY, _SEED = 16, 50, 3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What changes no step: how much is kept, how much is computed at once, how texts travel."""

    recompute: bool = False
    cached: bool = False  # gradients by microbatches
    compile: bool = False
    exchange: Exchange = "gather"

    @property
    def name(self) -> str:
        said = [name for name in ("recompute", "cached", "compile") if getattr(self, name)]
        return " + ".join([*said, *(["ring"] if self.exchange == "ring" else [])]) or "plain"

    def settings(self) -> dict[str, bool]:
        """Those of `distributed`."""
        return {"grad_checkpointing": self.recompute, "compile": self.compile}


@dataclass(frozen=True)
class Step:
    """What a step gave: the loss of the global batch, the whole gradients, their norm as the
    trainer takes it, the share of all weights on the process that has most, and the bytes that
    the main process kept for the backward pass."""

    loss: float
    gradients: Mapping[str, Tensor]
    norm: float
    held: float
    kept_bytes: int


# One step of a model of so many blocks in a layout; without one, in this process alone.
Run = Callable[[DistributedConfig | None, World | None, Variant, int], Step]


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
        local = _pairs()
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
                model, objective, local.microbatches(micro), group=group, autocast=nullcontext
            )
        return _step(_mean(loss, group), model, world, kept.num_bytes)

    return run


def decoder(config: DecoderConfig) -> Run:
    """A decoder with the loss of the next token over packed rows."""

    def run(
        layout: DistributedConfig | None, world: World | None, variant: Variant, depth: int
    ) -> Step:
        generator = torch.Generator().manual_seed(1)
        model: LaidOutDecoder = build_decoder(
            replace(config, depth=depth), vocab_size=_VOCABULARY, generator=generator
        )
        rows = _rows(config.context)
        num_tokens = counted(rows.labels)
        group, share = None, _BATCH
        if world is not None and layout is not None:
            assert isinstance(model, Decoder)
            model = apply_layout(model, layout, world)
            group, share = world.loss_group, _BATCH // world.degrees.data
            first = share * world.data_rank
            rows = Rows(*(part[first : first + share].to(world.device) for part in rows))
        num_processes = dist.get_world_size(group) if group is not None else 1
        kept = Kept()
        with kept if variant == Variant() else nullcontext():
            if isinstance(model, PipelinedDecoder):
                assert layout is not None
                loss = model.forward_backward(
                    rows,
                    share // microbatch_size(layout, None, share),
                    num_tokens=num_tokens,
                    num_processes=num_processes,
                    autocast=nullcontext,
                )
            else:
                logits_BLV = model(rows.tokens, rows.positions, rows.offsets)
                loss = language_loss(
                    logits_BLV, rows.labels, num_tokens=num_tokens, num_processes=num_processes
                )
                torch.autograd.backward(loss)
        return _step(_mean(loss.detach(), group), model, world, kept.num_bytes)

    return run


def _rows(length: int) -> Rows:
    """Rows of up to four documents each."""
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(0, _VOCABULARY, (_BATCH, length), generator=generator)
    starts = torch.randint(1, length, (_BATCH, 3), generator=generator).sort(1).values
    offsets = torch.nn.functional.pad(starts, (1, 0))
    offsets = torch.nn.functional.pad(offsets, (0, 1), value=length).int()
    return Rows(tokens, positions(offsets, length), offsets, next_tokens(tokens, offsets))


def _pairs() -> Batch:
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


def _mean(loss: Tensor, group: dist.ProcessGroup | None) -> float:
    size = dist.get_world_size(group) if group is not None else 1
    return float(sum_over(loss.double(), group)) / size


def _step(loss: float, model: nn.Module, world: World | None, kept_bytes: int) -> Step:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")
        gradients[name] = whole(parameter.grad)
    stages = world.axis("pp") if world is not None else None
    group = stages.get_group() if stages is not None else None
    gradients = gather_named(gradients, group)
    num_values = sum(gradient.numel() for gradient in gradients.values())
    held = sum(_local(parameter).numel() for parameter in model.parameters()) / num_values
    once = model.parameters()
    if isinstance(model, PipelinedDualEncoder | PipelinedDecoder):
        once = model.counted_parameters()
    norm = float(gradient_norm(once, group))
    most = torch.tensor(held)
    if world is not None and world.group is not None:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=world.group)
    on_cpu = {name: gradient.cpu() for name, gradient in gradients.items()}
    return Step(loss, on_cpu, norm, float(most), kept_bytes)


class Kept(saved_tensors_hooks):
    """Counts what autograd keeps inside, every storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        super().__init__(self._count, lambda kept: kept)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def _count(self, tensor: Tensor) -> Tensor:
        local = _local(tensor)
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
        storage = local.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# The name of a column, and what runs it.
COLUMNS: Mapping[str, Run] = {
    "dual encoder, softmax": dual_encoder(CLIP, "softmax"),
    "dual encoder, sigmoid": dual_encoder(CLIP, "sigmoid"),
    "pooled dual encoder, softmax": dual_encoder(POOLED, "softmax"),
    "MoE decoder": decoder(MIXED),
}

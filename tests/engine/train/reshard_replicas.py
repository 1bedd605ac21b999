"""What reshard_worker.py saves and reads: two kinds of model in every layout, with AdamW and an
average, as the trainer has them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.data.pairs import Batch
from carillon.engine.losses.contrastive import ContrastiveConfig, ContrastiveObjective
from carillon.engine.models.encoders.text import TextOverrides
from carillon.engine.models.encoders.vision import VisionOverrides
from carillon.engine.models.towers.decoder_config import DecoderConfig, MoeConfig
from carillon.engine.models.towers.dual_encoder import DualEncoderConfig, build_dual_encoder
from carillon.engine.parallel.apply import apply_layout
from carillon.engine.parallel.collectives import by_mesh, gradient_norm
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.mesh import World, degrees_of, lay_out
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.parallel.routers import finish_step
from carillon.engine.parallel.zigzag import Zigzag
from carillon.engine.train.language_step import language_forward_backward
from carillon.engine.train.optim import NamedAdamW, OptimizationConfig, WeightAverage
from carillon.engine.train.parity.decoder import LENGTH, OFFSETS, VOCABULARY, drawn, margins
from carillon.engine.train.parity.step import mean_over
from carillon.engine.train.step import forward_backward

Layout = tuple[int, dict[str, Any]]  # processes, and what `distributed` sets
LAYOUTS: dict[str, dict[str, Layout]] = {
    "dual encoder": {
        "one": (1, {}),
        "dp2": (2, {}),
        "fsdp2": (2, {"zero_stage": 3}),
        "tp2": (2, {"tp": 2}),
        "pp2": (2, {"pp": 2}),
        "fsdp4": (4, {"zero_stage": 3}),
        "hsdp2x2": (4, {"zero_stage": 3, "dp_replicate": 2, "dp_shard": 2}),
        "tp4": (4, {"tp": 4}),
        "tp2 fsdp2": (4, {"zero_stage": 3, "tp": 2}),
        "pp2 fsdp2": (4, {"zero_stage": 3, "pp": 2}),
        "pp2 tp2": (4, {"pp": 2, "tp": 2}),
    },
    "decoder": {
        "one": (1, {}),
        "fsdp2": (2, {"zero_stage": 3}),
        "ep2": (2, {"zero_stage": 3, "ep": 2}),
        "cp2": (2, {"cp": 2}),
        "pp2": (2, {"pp": 2}),
        "ep2 tp2": (4, {"zero_stage": 3, "ep": 2, "tp": 2}),
    },
}
BATCH = len(OFFSETS)
# Odd widths, where the models allow them: shards of unequal size.
DUAL_ENCODER = DualEncoderConfig(
    dims=18,
    vision_backbone="vit-ti-8",
    vision=VisionOverrides(image_size=16, width=32, depth=2, num_heads=4),
    text_backbone="clip-text-ti",
    text=TextOverrides(context=9, width=32, depth=2, num_heads=4),
)
DECODER = DecoderConfig(
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    context=LENGTH,
    moe=MoeConfig(
        num_experts=6,
        k=2,
        expert_width=18,
        shared_experts=1,
        score="sigmoid",
        balance_loss=0.02,
        bias_speed=0.05,
    ),
)


class Replica(ABC):
    """One kind of model, in this process's place of a layout."""

    model: Any

    def __init__(self, distributed: dict[str, Any]) -> None:
        self.config = DistributedConfig(device="cpu", precision="fp32", **distributed)
        size, device = dist.get_world_size() if dist.is_initialized() else 1, torch.device("cpu")
        degrees = degrees_of(self.config, size)
        alone = World(rank=0, size=1, device=device, degrees=degrees, meshes=None)
        self.world = lay_out(degrees, device) if size > 1 else alone
        self.model = apply_layout(self.build(), self.config, self.world)
        optimization = OptimizationConfig(steps=1)
        self.optimizer = NamedAdamW(self.model, optimization, self.model.no_decay_names())
        self.average = WeightAverage(self.model, 0.9)

    @abstractmethod
    def build(self) -> Any:
        """The whole model, before it is laid out."""

    @abstractmethod
    def forward_backward(self, step: int) -> float:
        """Adds the gradients of a step; returns the loss of the global batch."""

    @abstractmethod
    def end_step(self) -> None:
        """What the optimizer does not do."""

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    @property
    def stages(self) -> dist.ProcessGroup | None:
        """The processes that hold other stages."""
        pp = self.world.axis("pp")
        return None if pp is None else pp.get_group()

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"model.{name}": value for name, value in self.buffers()}
        moments = self.optimizer.state_tensors()
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        return tensors | {f"average.{n}": value for n, value in self.average.tensors.items()}

    def step(self, step: int) -> float:
        loss = self.forward_backward(step)
        norm = gradient_norm(self._counted(), self.stages)
        for parameters in by_mesh(self.model.parameters()):
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm, foreach=False)
        self.optimizer.step(1e-3)
        self.end_step()
        self.average.update(self.model)
        self.optimizer.zero_grad()
        return loss

    def microbatch_size(self, share: int) -> int:
        return microbatch_size(self.config, None, share)

    def _counted(self) -> Iterator[nn.Parameter]:
        pipelined = isinstance(self.model, PipelinedDecoder | PipelinedDualEncoder)
        counted: Iterator[nn.Parameter] = (
            self.model.counted_parameters() if pipelined else self.model.parameters()
        )
        return counted


class DualEncoderReplica(Replica):
    objective = ContrastiveObjective(ContrastiveConfig())

    def build(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return build_dual_encoder(DUAL_ENCODER, vocab_size=VOCABULARY, generator=generator)

    def forward_backward(self, step: int) -> float:
        share, group = BATCH // self.world.degrees.data, self.world.data_group
        loss = forward_backward(
            self.model,
            self.objective,
            pairs(step).microbatches(share)[self.world.data_rank],
            self.microbatch_size(share),
            group=group,
            autocast=nullcontext,
        )
        return mean_over(loss, group)

    def end_step(self) -> None:
        self.model.clamp_scale_()


def pairs(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        images=torch.randint(0, 256, (BATCH, 16, 16, 3), generator=generator, dtype=torch.uint8),
        tokens=torch.randint(0, VOCABULARY, (BATCH, 9), generator=generator),
        lengths=torch.randint(3, 10, (BATCH,), generator=generator),
        keys=[str(i) for i in range(BATCH)],
        languages=["en"] * BATCH,
        bad=[],
    )


class DecoderReplica(Replica):
    """`margin` is the least one of a router's choices in steps of one process: where it is small,
    rounding would decide (engine/train/parity/decoder.py)."""

    margin = float("inf")

    def build(self) -> Any:
        return drawn(DECODER)

    def forward_backward(self, step: int) -> float:
        rows, world = rows_of(step), self.world
        if world.size == 1:
            self.margin = min(self.margin, *margins(self.model, rows))
        own = rows.split(BATCH // world.degrees.data)[world.data_rank]
        context = world.axis("cp")
        if context is not None:
            own = Zigzag(context.size(), context.get_local_rank()).share_of(own)
        num = len(own.tokens) // self.microbatch_size(len(own.tokens))
        loss = language_forward_backward(self.model, own, num, world=world, autocast=nullcontext)
        return mean_over(loss, world.loss_group)

    def end_step(self) -> None:
        finish_step(self.model.routers(), self.world.loss_group)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.router_biases()


def rows_of(step: int) -> PackedRows:
    generator = torch.Generator().manual_seed(70 + step)  # such that `margin` is large enough
    drawn_BL = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return PackedRows.of(drawn_BL, OFFSETS)


KINDS: dict[str, type[Replica]] = {"dual encoder": DualEncoderReplica, "decoder": DecoderReplica}

"""The dual encoder over pipeline stages: both towers as pipelines of their own over one group.

The contrastive loss couples the whole batch, so a step makes the two passes of cached gradients
(engine/train/step.py): features of all microbatches without a graph, the loss of the whole batch on
every process of the pipeline, then a step of any schedule with the gradients of the features given.
A process keeps the parameters of its stages only, under the whole model's names. Scale and bias are
on every process of the pipeline and get equal gradients there; one of them counts in the norm.
Trade-off: the whole model is drawn in host memory first, so that its weights are one process's.
Left out: running the two towers' pipelines at once.
Status: runs on CPU with gloo; not run on a GPU yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from carillon.engine.data.pairs import Batch
from carillon.engine.models.towers.dual_encoder import MAX_LOGIT_SCALE, DualEncoder
from carillon.engine.models.towers.stages import ScalePiece, TextPiece, VisionPiece, pieces
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline import Pipeline, Shapes, from_last_stage
from carillon.engine.parallel.pipeline_split import split_of, stage_imbalance, stages_of


class PipelinedDualEncoder(nn.Module):
    """This process's stages of a dual encoder, with the whole model's names."""

    def __init__(
        self,
        model: DualEncoder,
        config: DistributedConfig,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.dims = model.dims
        self._vision_config, self._text_config = model.vision.config, model.text.config
        costs = model.costs(self._vision_config.image_size, self._text_config.context)
        self.stage_imbalance = stage_imbalance(config, {"vision": costs[0], "text": costs[1]})
        wanted = stages_of(config, dist.get_rank(group))
        vision = pieces(model, "vision", split_of(config, "vision", costs[0]), wanted)
        text = pieces(model, "text", split_of(config, "text", costs[1]), wanted)
        self._towers: list[VisionPiece | TextPiece] = [*vision, *text]
        self.scale = ScalePiece(model.logit_scale, model.logit_bias)
        self.parts = nn.ModuleList([*self._towers, self.scale])
        self._vision = Pipeline(vision, config, group, device=device, loss=_product)
        self._text = Pipeline(text, config, group, device=device, loss=_product)
        self._counts_scale = dist.get_rank(group) == 0
        shapes_only = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
        self.flops_per_sample = copy.deepcopy(model, memo=shapes_only).flops_per_sample

    def features(
        self,
        batch: Batch,
        num_microbatches: int,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Tensor, Tensor]:
        """Of pictures and texts, without a graph, on every process: (B, D) each."""
        for piece in self._towers:
            piece.autocast = autocast
        shapes = self._shapes(batch, num_microbatches)
        image = self._vision.forward(batch.images, {}, shapes[0], num_microbatches)
        lengths = {"lengths_B": batch.lengths}
        text = self._text.forward(batch.tokens, lengths, shapes[1], num_microbatches)
        shape = (len(batch.keys), self.dims)
        return from_last_stage(image, shape, self._vision), from_last_stage(text, shape, self._text)

    def backpropagate(
        self, batch: Batch, num_microbatches: int, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        """Add the parameters' gradients, from those of the features; `features` came before."""
        shapes = self._shapes(batch, num_microbatches)
        self._vision.step(batch.images, {}, image_grad, shapes[0], num_microbatches)
        lengths = {"lengths_B": batch.lengths}
        self._text.step(batch.tokens, lengths, text_grad, shapes[1], num_microbatches)

    def _shapes(self, batch: Batch, num_microbatches: int) -> tuple[Shapes, Shapes]:
        size = len(batch.keys) // num_microbatches
        vision, text, length = self._vision_config, self._text_config, batch.tokens.shape[1]
        return (
            Shapes(
                first=(size, *batch.images.shape[1:]),
                dtype=batch.images.dtype,
                between=(size, vision.num_tokens, vision.width),
                last=(size, self.dims),
            ),
            Shapes(
                first=(size, length),
                dtype=batch.tokens.dtype,
                between=(size, length, text.width),
                last=(size, self.dims),
            ),
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this process, named as in the whole model."""
        return chain.from_iterable(
            part.named_parameters(prefix, recurse, remove_duplicate) for part in self.parts
        )

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Such that each parameter of the model is counted by one process of the pipeline."""
        counted = self.parts if self._counts_scale else self._towers
        return chain.from_iterable(part.parameters() for part in counted)

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """As DualEncoder's."""
        self.scale.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def blocks(self) -> Iterator[nn.Module]:
        """This process's blocks: the units of sharding, recompute and compile."""
        return chain.from_iterable(piece.blocks() for piece in self._towers)

    def set_recompute(self, enabled: bool) -> None:
        """As DualEncoder's."""
        for piece in self._towers:
            piece.set_recompute(enabled)

    def no_decay_names(self) -> frozenset[str]:
        """As DualEncoder's, of this process's parameters."""
        return frozenset(name for name, value in self.named_parameters() if value.ndim < 2)


def _product(features: Tensor, gradient: Tensor) -> Tensor:
    """What has `gradient` as the gradient of the features."""
    return (features * gradient).sum()

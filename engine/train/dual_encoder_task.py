"""Pairs through a dual encoder: the contrastive loss of the global batch, scored by retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from torch import Tensor, nn

from carillon.engine.data.pairs import Batch, PositionedSamples
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData
from carillon.engine.eval.suite import evaluate_in_training
from carillon.engine.losses.contrastive import ContrastiveObjective
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.towers.dual_encoder import DualEncoder, DualEncoderConfig
from carillon.engine.parallel.apply import LaidOut, apply_layout
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.train.profile import Work, work_of_pairs
from carillon.engine.train.run_config import RunConfig, new_dual_encoder
from carillon.engine.train.step import forward_backward, loss_alone
from carillon.engine.train.task import Score, Task


class DualEncoderTask(Task[Batch]):
    """Owns the dual encoder of a run, and its loader of pairs."""

    rate_name = "images_per_s"
    has_evaluation = True

    def __init__(
        self,
        config: RunConfig,
        world: World,
        data: TrainingData,
        tokenizer: Tokenizer,
        before_batch: Callable[[], None],
    ) -> None:
        assert isinstance(config.model, DualEncoderConfig)
        samples = PositionedSamples(
            data,
            tokenizer,
            size=vision_config(config.model.vision_backbone, config.model.vision).image_size,
            context=text_config(config.model.text_backbone, config.model.text).context,
            same_field=config.loss.itc.same_field,
        )
        super().__init__(config, world, tokenizer, samples, before_batch)
        model = new_dual_encoder(config, tokenizer.vocab_size)
        self._model: LaidOut = apply_layout(model, config.distributed, world)
        self._objective = ContrastiveObjective(config.loss.itc)
        self._flops_per_sample = cache(self._model.flops_per_sample)

    @property
    def model(self) -> LaidOut:
        return self._model

    def stage_imbalance(self) -> float:
        return self.model.stage_imbalance if isinstance(self.model, PipelinedDualEncoder) else 1.0

    def no_decay_names(self) -> frozenset[str]:
        return self.model.no_decay_names()

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        if isinstance(self.model, PipelinedDualEncoder):
            return self.model.counted_parameters()
        return self.model.parameters()

    def work(self, batch: Batch) -> Work:
        return work_of_pairs(batch, self._flops_per_sample)

    def forward_backward(self, batch: Batch) -> Tensor:
        size, group = self.microbatch_size(len(batch.keys)), self.world.data_group
        return forward_backward(
            self.model, self._objective, batch, size, group=group, autocast=self.autocast
        )

    def loss_alone(self, batch: Batch) -> Tensor:
        assert isinstance(self.model, DualEncoder)  # the shadow looks into no pipeline
        size, group = self.microbatch_size(len(batch.keys)), self.world.data_group
        return loss_alone(
            self.model, self._objective, batch, size, group=group, autocast=self.autocast
        )

    def end_step(self, *, skipped: bool) -> dict[str, float]:
        if not skipped:
            self.model.clamp_scale_()
        return {}

    def score(self, weights: Mapping[str, Tensor]) -> Score:
        model = new_dual_encoder(self.config, self.tokenizer.vocab_size).to(self.world.device)
        model.load_state_dict(dict(weights))
        metrics = evaluate_in_training(
            model,
            self.tokenizer,
            self.config.evaluation,
            self.config.data,
            bf16=self.config.distributed.precision != "fp32",
            before_batch=self.before_batch,
        )
        best = metrics.get("retrieval/mean_r@10")
        told = "" if best is None else f"retrieval: mean R@10 {100 * best:.2f}%"
        return Score(metrics, best, told)

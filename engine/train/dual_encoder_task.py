"""Pairs through a dual encoder: the contrastive loss of the global batch, scored by retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache

from torch import Tensor, nn

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.pairs import Batch, PositionedSamples
from carillon.engine.data.shards import Split
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.eval.suite import evaluate_in_training
from carillon.engine.losses.contrastive import ContrastiveObjective
from carillon.engine.models.catalog import text_config, vision_config
from carillon.engine.models.towers.dual_encoder import DualEncoder, DualEncoderConfig
from carillon.engine.parallel.apply import LaidOut, apply_layout
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.parallel.pipelined_dual_encoder import PipelinedDualEncoder
from carillon.engine.train.profile import Work, work_of_pairs
from carillon.engine.train.run_config import RunConfig, new_dual_encoder
from carillon.engine.train.step import forward_backward, loss_alone
from carillon.engine.train.task import Score, autocast_of


class DualEncoderTask:
    """Owns the dual encoder of a run, and its loader of pairs."""

    rate_name = "images_per_s"
    has_evaluation = True

    def __init__(
        self,
        config: RunConfig,
        world: World,
        split: Split,
        tokenizer: Tokenizer,
        before_batch: Callable[[], None],
    ) -> None:
        assert isinstance(config.model, DualEncoderConfig)
        self._config, self._world, self._tokenizer = config, world, tokenizer
        self._before_batch = before_batch
        model = new_dual_encoder(config, tokenizer.vocab_size)
        self.model: LaidOut = apply_layout(model, config.distributed, world)
        samples = PositionedSamples(
            split,
            config.data,
            tokenizer,
            size=vision_config(config.model.vision_backbone, config.model.vision).image_size,
            context=text_config(config.model.text_backbone, config.model.text).context,
            seed=config.experiment.seed,
            same_field=config.loss.itc.same_field,
        )
        self.loader = TrainingLoader(
            samples, rank=world.data_rank, world_size=world.degrees.data, device=world.device
        )
        self._objective = ContrastiveObjective(config.loss.itc)
        self._flops_per_sample = cache(self.model.flops_per_sample)

    def stage_imbalance(self) -> float:
        return self.model.stage_imbalance if isinstance(self.model, PipelinedDualEncoder) else 1.0

    def no_decay_names(self) -> frozenset[str]:
        return self.model.no_decay_names()

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        if isinstance(self.model, PipelinedDualEncoder):
            return self.model.counted_parameters()
        return self.model.parameters()

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def work(self, batch: Batch) -> Work:
        return work_of_pairs(batch, self._flops_per_sample)

    def forward_backward(self, batch: Batch) -> Tensor:
        return forward_backward(
            self.model,
            self._objective,
            batch,
            self._microbatch_size(batch),
            group=self._world.data_group,
            autocast=self._autocast,
        )

    def loss_alone(self, batch: Batch) -> Tensor:
        assert isinstance(self.model, DualEncoder)  # the shadow looks into no pipeline
        return loss_alone(
            self.model,
            self._objective,
            batch,
            self._microbatch_size(batch),
            group=self._world.data_group,
            autocast=self._autocast,
        )

    def end_step(self, *, skipped: bool) -> dict[str, float]:
        if not skipped:
            self.model.clamp_scale_()
        return {}

    def evaluate(self, weights: Mapping[str, Tensor]) -> Score | None:
        if not self._world.is_main:
            return None
        config = self._config
        model = new_dual_encoder(config, self._tokenizer.vocab_size)
        model.to(self._world.device)
        model.load_state_dict(dict(weights))
        metrics = evaluate_in_training(
            model,
            self._tokenizer,
            config.evaluation,
            config.data,
            bf16=config.distributed.precision != "fp32",
            before_batch=self._before_batch,
        )
        best = metrics.get("retrieval/mean_r@10")
        told = "" if best is None else f"retrieval: mean R@10 {100 * best:.2f}%"
        return Score(metrics, best, told)

    def _microbatch_size(self, batch: Batch) -> int:
        config = self._config
        return microbatch_size(config.distributed, config.data.micro_batch_size, len(batch.keys))

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast_of(self._config.distributed, self._world)

"""Rows of captions through a decoder: cross-entropy of the next token, scored on held-out rows.

Status: trains on CPU with gloo, in every layout that the parity table has; not run on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

from torch import Tensor

from carillon.engine.data.packed_captions import CaptionRows, PackedCaptions
from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.data.training_data import TrainingData
from carillon.engine.losses.language import counted
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.parallel.apply import LaidOutDecoder, apply_layout
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder
from carillon.engine.parallel.routers import finish_step
from carillon.engine.parallel.zigzag import Zigzag
from carillon.engine.train.language_step import language_forward_backward, language_loss_alone
from carillon.engine.train.profile import Work, work_of_rows
from carillon.engine.train.run_config import RunConfig, new_decoder
from carillon.engine.train.task import Score, Task


class DecoderTask(Task[CaptionRows]):
    """Owns the decoder of a run, and its loader of rows."""

    rate_name = "rows_per_s"
    has_evaluation = False

    def __init__(
        self,
        config: RunConfig,
        world: World,
        data: TrainingData,
        tokenizer: Tokenizer,
        before_batch: Callable[[], None],
    ) -> None:
        assert isinstance(config.model, DecoderConfig)
        self._samples = PackedCaptions(
            data,
            tokenizer,
            context=config.model.context,
        )
        super().__init__(config, world, tokenizer, self._samples, before_batch)
        model = new_decoder(config, tokenizer.vocab_size)
        self._model: LaidOutDecoder = apply_layout(model, config.distributed, world)
        self._flops_per_token = cache(self._model.flops_per_token)

    @property
    def model(self) -> LaidOutDecoder:
        return self._model

    def stage_imbalance(self) -> float:
        return self.model.stage_imbalance if isinstance(self.model, PipelinedDecoder) else 1.0

    def no_decay_names(self) -> frozenset[str]:
        return self.model.no_decay_names()

    def buffers(self) -> dict[str, Tensor]:
        return dict(self.model.router_biases())

    def work(self, batch: CaptionRows) -> Work:
        return work_of_rows(batch, self._flops_per_token)

    def forward_backward(self, batch: CaptionRows) -> Tensor:
        rows, num = self._share(batch)
        return language_forward_backward(
            self.model, rows, num, world=self.world, autocast=self.autocast
        )

    def loss_alone(self, batch: CaptionRows) -> Tensor:
        assert isinstance(self.model, Decoder)  # the shadow looks into no pipeline
        rows, num = self._share(batch)
        return language_loss_alone(self.model, rows, num, world=self.world, autocast=self.autocast)

    def end_step(self, *, skipped: bool) -> dict[str, float]:
        stages = self.world.axis("pp")
        return finish_step(
            self.model.routers(),
            self.world.loss_group,
            stages=None if stages is None else stages.get_group(),
            move_bias=not skipped,
        )

    def score(self, weights: Mapping[str, Tensor]) -> Score | None:
        """The mean loss of the tokens of held-out captions, and its exponential."""
        rows = self._samples.held_out_rows(self.config.evaluation.in_training.max_queries)
        if rows is None:
            return None
        model = new_decoder(self.config, self.tokenizer.vocab_size).to(self.world.device)
        model.load_state_dict(dict(weights))
        share = self.config.data.batch_size // self.world.degrees.data
        total, num_tokens = 0.0, int(counted(rows.labels))
        for part in rows.split(self.microbatch_size(share)):  # what memory has held already
            self.before_batch()
            part = PackedRows(*(x.to(self.world.device) for x in part))
            mean = language_loss_alone(model, part, 1, world=None, autocast=self.autocast)
            total += float(mean) * int(counted(part.labels))
        loss = total / max(num_tokens, 1)
        metrics = {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}
        return Score(metrics, -loss, f"held out: loss {loss:.4f} of {num_tokens:,} tokens")

    def _share(self, batch: CaptionRows) -> tuple[PackedRows, int]:
        """This process's part of the rows, of their tokens where context is parallel, and the
        number of its microbatches."""
        rows, context = batch.rows, self.world.axis("cp")
        if context is not None:
            rows = Zigzag(context.size(), context.get_local_rank()).share_of(rows)
        return rows, len(rows.tokens) // self.microbatch_size(len(rows.tokens))

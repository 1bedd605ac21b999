"""Rows of captions through a decoder: cross-entropy of the next token, scored on held-out rows.

Status: trains on CPU with gloo, in every layout that the parity table has; not run on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache

from torch import Tensor, nn

from carillon.engine.data.loader import TrainingLoader
from carillon.engine.data.packed_captions import CaptionRows, PackedCaptions
from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.data.shards import Split
from carillon.engine.data.tokenizer import Tokenizer
from carillon.engine.losses.language import counted
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.models.towers.decoder_config import DecoderConfig
from carillon.engine.parallel.apply import LaidOutDecoder, apply_layout
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipeline_split import microbatch_size
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder
from carillon.engine.parallel.routers import finish_step
from carillon.engine.parallel.zigzag import Zigzag
from carillon.engine.train.language_step import language_forward_backward, language_loss_alone
from carillon.engine.train.profile import Work, work_of_rows
from carillon.engine.train.run_config import RunConfig, new_decoder
from carillon.engine.train.task import Score, autocast_of


class DecoderTask:
    """Owns the decoder of a run, and its loader of rows."""

    rate_name = "rows_per_s"
    has_evaluation = False

    def __init__(
        self,
        config: RunConfig,
        world: World,
        split: Split,
        tokenizer: Tokenizer,
        before_batch: Callable[[], None],
    ) -> None:
        assert isinstance(config.model, DecoderConfig)
        self._config, self._world, self._tokenizer = config, world, tokenizer
        self._before_batch = before_batch
        model = new_decoder(config, tokenizer.vocab_size)
        self.model: LaidOutDecoder = apply_layout(model, config.distributed, world)
        self._samples = PackedCaptions(
            split,
            config.data,
            tokenizer,
            context=config.model.context,
            seed=config.experiment.seed,
        )
        self.loader = TrainingLoader(
            self._samples, rank=world.data_rank, world_size=world.degrees.data, device=world.device
        )
        self._flops_per_token = cache(self.model.flops_per_token)

    def stage_imbalance(self) -> float:
        return self.model.stage_imbalance if isinstance(self.model, PipelinedDecoder) else 1.0

    def no_decay_names(self) -> frozenset[str]:
        return self.model.no_decay_names()

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def buffers(self) -> dict[str, Tensor]:
        return dict(self.model.router_biases())

    def work(self, batch: CaptionRows) -> Work:
        return work_of_rows(batch, self._flops_per_token)

    def forward_backward(self, batch: CaptionRows) -> Tensor:
        rows = self._share(batch)
        num = len(rows.tokens) // self._microbatch_size(len(rows.tokens))
        return language_forward_backward(
            self.model, rows, num, world=self._world, autocast=self._autocast
        )

    def loss_alone(self, batch: CaptionRows) -> Tensor:
        assert isinstance(self.model, Decoder)  # the shadow looks into no pipeline
        rows = self._share(batch)
        num = len(rows.tokens) // self._microbatch_size(len(rows.tokens))
        return language_loss_alone(
            self.model, rows, num, world=self._world, autocast=self._autocast
        )

    def end_step(self, *, skipped: bool) -> dict[str, float]:
        stages = self._world.axis("pp")
        return finish_step(
            self.model.routers(),
            self._world.loss_group,
            stages=None if stages is None else stages.get_group(),
            move_bias=not skipped,
        )

    def evaluate(self, weights: Mapping[str, Tensor]) -> Score | None:
        """The mean loss of the tokens of held-out captions, and its exponential."""
        if not self._world.is_main:
            return None
        config = self._config
        rows = self._samples.held_out_rows(config.evaluation.in_training.max_queries)
        if rows is None:
            return None
        model = new_decoder(config, self._tokenizer.vocab_size)
        model.to(self._world.device)
        model.load_state_dict(dict(weights), strict=False)  # tallies of routers are no weights
        share = config.data.batch_size // self._world.degrees.data
        total, num_tokens = 0.0, int(counted(rows.labels))
        for part in rows.split(self._microbatch_size(share)):  # what memory has held already
            self._before_batch()
            part = PackedRows(*(x.to(self._world.device) for x in part))
            mean = language_loss_alone(model, part, 1, world=None, autocast=self._autocast)
            total += float(mean) * int(counted(part.labels))
        loss = total / max(num_tokens, 1)
        metrics = {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}
        return Score(metrics, -loss, f"held out: loss {loss:.4f} of {num_tokens:,} tokens")

    def _share(self, batch: CaptionRows) -> PackedRows:
        """This process's part of the rows: of their tokens, where context is parallel."""
        context = self._world.axis("cp")
        if context is None:
            return batch.rows
        return Zigzag(context.size(), context.get_local_rank()).share_of(batch.rows)

    def _microbatch_size(self, share: int) -> int:
        """Rows of a microbatch, of so many that a process has."""
        config = self._config
        return microbatch_size(config.distributed, config.data.micro_batch_size, share)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast_of(self._config.distributed, self._world)

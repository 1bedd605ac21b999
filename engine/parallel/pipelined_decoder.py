"""The decoder over pipeline stages: one pipeline, with the language-model loss on the last stage.

The number of tokens that count in the global batch is known before the step, so the losses of
microbatches add up to the loss, and the terms of routers enter by their own gradients: one pass of
any schedule is the step. Microbatches are of rows: whole ones, or with context parallelism the
process's share of each. With sequence parallelism a share of those tokens travels between stages.
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

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.losses.language import SplitVocabulary, language_loss
from carillon.engine.models.towers.decoder import Decoder, router_biases, routers
from carillon.engine.models.towers.decoder_stages import decoder_pieces
from carillon.engine.nn.router import Router
from carillon.engine.parallel.config import DistributedConfig
from carillon.engine.parallel.pipeline import Pipeline, Shapes, from_last_stage
from carillon.engine.parallel.pipeline_split import split_of, stage_imbalance, stages_of


class PipelinedDecoder(nn.Module):
    """This process's stages of a decoder, with the whole model's names."""

    def __init__(
        self,
        model: Decoder,
        config: DistributedConfig,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._width, self.vocab_size = model.config.width, model.head.out_features
        self._ways_by_tokens = config.tp if config.sequence_parallel else 1
        costs = model.costs(model.config.context)
        self.stage_imbalance = stage_imbalance(config, {"decoder": costs})
        split = split_of(config, "decoder", costs)
        self._pieces = decoder_pieces(model, split, stages_of(config, dist.get_rank(group)))
        self.parts = nn.ModuleList(self._pieces)
        self._pipeline = Pipeline(self._pieces, config, group, device=device, loss=self._loss)
        self._counted: tuple[Tensor | int, int, SplitVocabulary | None] = (1, 1, None)
        shapes_only = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
        self.flops_per_token = copy.deepcopy(model, memo=shapes_only).flops_per_token

    def forward_backward(
        self,
        rows: PackedRows,
        num_microbatches: int,
        *,
        num_tokens: Tensor | int,
        num_processes: int,
        split: SplitVocabulary | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """Add the gradients of these rows; returns their loss on every process of the pipeline.

        `num_tokens` are those counted in the global batch, `num_processes` those whose losses are
        averaged, as in `language_loss`.
        """
        for piece in self._pieces:
            piece.autocast = autocast
        for router in self.routers():
            router.batch_share = 1 / num_microbatches
        self._counted = (num_tokens, num_processes, split)
        size, length = len(rows.tokens) // num_microbatches, rows.tokens.shape[1]
        shapes = Shapes(
            first=(size, length),
            dtype=rows.tokens.dtype,
            between=(size, length // self._ways_by_tokens, self._width),
            last=(size, length, self.vocab_size if split is None else split.num_own),
        )
        extras = {"positions_BL": rows.positions, "offsets_BS": rows.offsets}
        loss = self._pipeline.step(rows.tokens, extras, rows.labels, shapes, num_microbatches)
        return from_last_stage(loss, (), self._pipeline)

    def _loss(self, logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
        num_tokens, num_processes, split = self._counted
        return language_loss(
            logits_BLV,
            labels_BL,
            num_tokens=num_tokens,
            num_processes=num_processes,
            split=split,
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this process, named as in the whole model."""
        return chain.from_iterable(
            piece.named_parameters(prefix, recurse, remove_duplicate) for piece in self._pieces
        )

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """All of them: no other process of the pipeline has them."""
        return self.parameters()

    def blocks(self) -> Iterator[nn.Module]:
        """This process's blocks: the units of sharding and compile."""
        return chain.from_iterable(piece.own_blocks() for piece in self._pieces)

    def routers(self) -> Iterator[Router]:
        """The routers of this process's mixtures."""
        return chain.from_iterable(routers(piece) for piece in self._pieces)

    def router_biases(self) -> Iterator[tuple[str, Tensor]]:
        """As Decoder's, of this process's mixtures."""
        return chain.from_iterable(router_biases(piece) for piece in self._pieces)

    def set_recompute(self, enabled: bool) -> None:
        """As Decoder's."""
        for piece in self._pieces:
            piece.activation_recompute = enabled

    def no_decay_names(self) -> frozenset[str]:
        """As Decoder's, of this process's parameters."""
        return frozenset(name for name, value in self.named_parameters() if value.ndim < 2)

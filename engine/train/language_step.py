"""Forward and backward of one global batch of packed rows through a language model.

A mean over tokens is a sum of sums, so microbatches simply add up: the number of tokens that count
in the global batch is known before the first of them.
A pipeline's schedule takes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.losses.language import SplitVocabulary, counted, language_loss
from carillon.engine.models.towers.decoder import Decoder
from carillon.engine.parallel.apply import LaidOutDecoder, gradient_sync
from carillon.engine.parallel.collectives import sum_over
from carillon.engine.parallel.mesh import World
from carillon.engine.parallel.pipelined_decoder import PipelinedDecoder


def language_forward_backward(
    model: LaidOutDecoder,
    rows: PackedRows,
    num_microbatches: int,
    *,
    world: World | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Add the gradients of this process's rows; returns its loss, a detached scalar.

    The mean of the losses over `World.loss_group` is the loss of the global batch. Microbatches are
    of the same number of rows, which routers' auxiliary losses are means over.
    """
    scale = _scale(model, rows, world)
    if isinstance(model, PipelinedDecoder):
        return model.forward_backward(
            rows, num_microbatches, **scale._asdict(), autocast=autocast
        ).detach()
    model.set_batch_share(1 / num_microbatches)
    losses = []
    for index, part in enumerate(rows.split(len(rows.tokens) // num_microbatches)):
        with gradient_sync(model, enabled=index == num_microbatches - 1):
            loss = _loss(model, part, scale, autocast)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def language_loss_alone(
    model: Decoder,
    rows: PackedRows,
    num_microbatches: int,
    *,
    world: World | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """The loss of this process's rows, as `language_forward_backward` returns it, and nothing else.

    Where parameters are sharded, call it before that: its backward pass frees what this gathered.
    """
    scale = _scale(model, rows, world)
    parts = rows.split(max(1, len(rows.tokens) // num_microbatches))
    return torch.stack([_loss(model, part, scale, autocast) for part in parts]).sum()


class _Scale(NamedTuple):
    """What of other processes a process's loss depends on; as in `language_loss`."""

    num_tokens: Tensor
    num_processes: int
    split: SplitVocabulary | None


def _scale(model: LaidOutDecoder, rows: PackedRows, world: World | None) -> _Scale:
    group = world.loss_group if world is not None else None
    tp = world.axis("tp") if world is not None else None
    return _Scale(
        num_tokens=sum_over(counted(rows.labels), group),
        num_processes=dist.get_world_size(group) if group is not None else 1,
        split=None if tp is None else SplitVocabulary(tp.get_group(), model.vocab_size),
    )


def _loss(
    model: Decoder,
    rows: PackedRows,
    scale: _Scale,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    with autocast():
        logits_BLV = model(rows.tokens, rows.positions, rows.offsets)
    return language_loss(logits_BLV, rows.labels, **scale._asdict())

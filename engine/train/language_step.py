"""Forward and backward of one global batch of packed rows through a language model.

A mean over tokens is a sum of sums, so microbatches simply add up: the number of tokens that count
in the global batch is known before the first of them.
A pipeline's schedule takes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.data.packed_rows import PackedRows
from carillon.engine.losses.language import SplitVocabulary, counted, language_loss
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
    group = world.loss_group if world is not None else None
    num_tokens = sum_over(counted(rows.labels), group)
    num_processes = dist.get_world_size(group) if group is not None else 1
    tp = world.axis("tp") if world is not None else None
    split = None if tp is None else SplitVocabulary(tp.get_group(), model.vocab_size)
    if isinstance(model, PipelinedDecoder):
        return model.forward_backward(
            rows,
            num_microbatches,
            num_tokens=num_tokens,
            num_processes=num_processes,
            split=split,
            autocast=autocast,
        ).detach()
    model.set_batch_share(1 / num_microbatches)
    losses = []
    for index, part in enumerate(rows.split(len(rows.tokens) // num_microbatches)):
        with gradient_sync(model, enabled=index == num_microbatches - 1):
            with autocast():
                logits_BLV = model(part.tokens, part.positions, part.offsets)
            loss = language_loss(
                logits_BLV,
                part.labels,
                num_tokens=num_tokens,
                num_processes=num_processes,
                split=split,
            )
            torch.autograd.backward(loss)
            losses.append(loss.detach())
    return torch.stack(losses).sum()

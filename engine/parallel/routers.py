"""After a step: what the routers of all processes did, and the bias that keeps experts balanced.

One sum over the processes of the batch carries all layers. Since every process adds the same
numbers, biases stay equal everywhere and equal those of one process: counts are exact.
Status: runs on CPU with gloo; CUDA with NCCL has not run on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from carillon.engine.nn.router import Router, Tally
from carillon.engine.parallel.collectives import sum_over


@torch.no_grad()
def finish_step(
    routers: Iterable[Router],
    group: dist.ProcessGroup | None,
    *,
    stages: dist.ProcessGroup | None = None,
    move_bias: bool = True,
) -> dict[str, float]:
    """Sum the tallies since the last call over `group` (World.loss_group), move the biases unless
    the step was skipped, begin new tallies; returns what to log, a mean or extreme over layers.

    `stages`: the processes of a pipeline, which have routers of their own each.
    """
    tallies = _finish(list(routers), group, move_bias)
    if stages is not None:
        parts: list[Any] = [None] * dist.get_world_size(stages)
        dist.all_gather_object(parts, tallies, group=stages)
        tallies = [tally for part in parts for tally in part]
    return _facts(tallies) if tallies else {}


def _finish(routers: list[Router], group: dist.ProcessGroup | None, move_bias: bool) -> list[Tally]:
    """What each router tallied, over the group, on the host."""
    if not routers:
        return []
    sums = sum_over(torch.cat([router.tally for router in routers]), group)
    tallies = []
    sizes = [len(router.tally) for router in routers]
    for router, own in zip(routers, torch.split(sums, sizes), strict=True):
        tallied = router.tallied(own)
        if move_bias:
            router.balance_(tallied.slots)
        router.tally.zero_()
        tallies.append(Tally(*(part.cpu() for part in tallied)))
    return tallies


def _facts(tallies: list[Tally]) -> dict[str, float]:
    """Loads are shares of the slots over an even share: 1 where experts are equally busy."""
    loads = [tally.slots / tally.slots.mean().clamp(min=1e-9) for tally in tallies]
    entropies = []
    for load in loads:
        share = load / len(load)
        entropies.append(float(torch.special.entr(share).sum()) / max(math.log(len(load)), 1e-9))

    def mean(name: str, over: str) -> float:
        ratios = [getattr(t, name) / getattr(t, over).clamp(min=1) for t in tallies]
        return float(torch.stack(ratios).mean())

    slots = torch.stack([tally.slots.sum() for tally in tallies])
    dropped = torch.stack([tally.dropped for tally in tallies])
    return {
        "moe/max_load": max(float(load.max()) for load in loads),
        "moe/min_load": min(float(load.min()) for load in loads),
        "moe/mean_tokens_per_expert": float(torch.stack([t.slots.mean() for t in tallies]).mean()),
        "moe/entropy": sum(entropies) / len(entropies),
        "moe/dropped_share": float((dropped / slots.clamp(min=1)).mean()),
        "moe/z_loss": mean("z_loss", "tokens"),
        "moe/balance_loss": mean("balance_loss", "rows"),
    }

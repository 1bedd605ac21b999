"""What a step did beside what it gave: that a row's layout was really taken.

Every schedule gives one result, and so does every way of context parallelism; a row of the table
names one, so what a process did is looked at. Left out: compiled blocks' recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.modules.module import register_module_forward_pre_hook

from carillon.engine.nn.decoder_block import DecoderBlock
from carillon.engine.nn.transformer import Block

Pass = Literal["forward", "backward", "weights"]
_PASSES: dict[str, Pass] = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "backward",
    "backward_weight_one_chunk": "weights",
}
_EXCHANGES = ("all_to_all_single", "batch_isend_irecv")


@dataclass
class Evidence:
    """Of one process and one step."""

    passes: list[tuple[Pass, int]] = field(default_factory=list)  # of a pipeline, and their stages
    exchanges: dict[str, int] = field(default_factory=dict)  # calls of torch.distributed
    recomputed: int = 0  # blocks that ran in the backward pass

    @property
    def ahead(self) -> int:
        """The most forward passes of a stage that waited for their backward passes."""
        waiting: dict[int, int] = {}
        most = 0
        for kind, stage in self.passes:
            if kind != "weights":
                waiting[stage] = waiting.get(stage, 0) + (1 if kind == "forward" else -1)
                most = max(most, waiting[stage])
        return most

    def facts(self) -> dict[str, Any]:
        """For a case's line of results."""
        return {
            "stages": sorted({stage for _, stage in self.passes}),
            "ahead": self.ahead,
            "weight_passes": sum(kind == "weights" for kind, _ in self.passes),
            "all_to_all": self.exchanges.get("all_to_all_single", 0),
            "sends": self.exchanges.get("batch_isend_irecv", 0),
            "recomputed": self.recomputed,
        }


@contextmanager
def looked_at() -> Iterator[Evidence]:
    """Inside, what this process does is written down."""
    found = Evidence()

    def note_pass(name: str) -> Callable[..., Any]:
        real = getattr(_PipelineStageBase, name)

        def noted(stage: Any, *given: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():  # else for features alone
                found.passes.append((_PASSES[name], stage.stage_index))
            return real(stage, *given, **named)

        return noted

    def note_exchange(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def noted(*given: Any, **named: Any) -> Any:
            found.exchanges[name] = found.exchanges.get(name, 0) + 1
            return real(*given, **named)

        return noted

    def note_block(module: nn.Module, _: Any) -> None:
        if isinstance(module, Block | DecoderBlock) and torch._C._current_graph_task_id() >= 0:
            found.recomputed += 1

    with ExitStack() as stack:
        for name in _PASSES:
            stack.enter_context(mock.patch.object(_PipelineStageBase, name, note_pass(name)))
        for name in _EXCHANGES:
            stack.enter_context(mock.patch.object(dist, name, note_exchange(name)))
        hook = register_module_forward_pre_hook(note_block)
        stack.callback(hook.remove)
        yield found

"""Tokens sent to their experts through DeepEP's buffers (`distributed.dispatcher: deepep`).

A token goes once to each process that has experts of its own choice, with its weights, however many
of them it chose there; a process weighs and sums what its experts make of it, and the way home adds
up the processes' sums. So less travels than by an all-to-all of slots, through kernels of its own
over NVLink and RDMA. A way's backward pass is the other way. Taken by name only, until it has been
measured. Left out: overlap with products, 8-bit floats on the way, the low-latency kernels.
Status: not run: DeepEP needs GPUs; sizes, arguments and gradients are tested on CPU against a
stand-in with its documented signatures.

Legend: T tokens, K experts of a token, D width, S tokens received, R rows laid out by expert.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from carillon.engine.nn.moe import ALIGNMENT, Experts, Plan, Slots
from carillon.engine.parallel.config import DEEPEP
from carillon.kernels.table import resolve

_BYTES = 2  # of a bfloat16


class BufferDispatch:
    """Moe.dispatch through one buffer of a group, made when the width is first known.

    All mixtures of a model share one: a buffer holds gigabytes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._buffer: Any = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes are read back
    def __call__(self, x_TD: Tensor, weights_TK: Tensor, slots: Slots, experts: Experts) -> Tensor:
        buffer = self._buffer_for(x_TD.shape[1])
        indices_TK = slots.indices.long()
        if slots.capacity is not None:
            indices_TK = indices_TK.where(slots.plan(alignment=1).slot_to_row >= 0, -1)
        way = _Way(buffer, indices_TK, slots.num_experts)
        rows_SD, weights_SK = _Out.apply(x_TD, weights_TK, way)  # type: ignore[no-untyped-call]
        own = slots.num_experts // dist.get_world_size(self._group)
        plan, here_SK = _plan(way.received_indices, own)
        results_SD = resolve("moe_unpermute", x_TD.device)(
            experts(rows_SD, plan),
            weights_SK.where(here_SK, 0.0),
            plan.row_to_slot,
            plan.slot_to_row,
        )
        y_TD: Tensor = _Home.apply(results_SD, way)  # type: ignore[no-untyped-call]
        return y_TD

    def _buffer_for(self, width: int) -> Any:
        if self._buffer is None:
            cls = importlib.import_module(DEEPEP).Buffer
            size = dist.get_world_size(self._group)
            configs = (cls.get_dispatch_config(size), cls.get_combine_config(size))
            nvlink, rdma = (
                max(getattr(config, name)(width * _BYTES, size) for config in configs)
                for name in ("get_nvl_buffer_size_hint", "get_rdma_buffer_size_hint")
            )
            self._buffer = cls(self._group, nvlink, rdma)
        return self._buffer


def _plan(indices_SK: Tensor, own: int) -> tuple[Plan, Tensor]:
    """Rows by own expert, and which choices are of own experts; the others stand at the end, as of
    one expert more, where products give zeros.
    """
    here_SK = indices_SK >= 0
    slots = Slots(indices_SK.where(here_SK, own).int(), 1, own + 1, None)
    plan = slots.plan(ALIGNMENT)
    return plan._replace(offsets=plan.offsets[:-1].contiguous()), here_SK


class _Way:
    """Where the tokens of one forward pass go: made on the way out, used by the three others."""

    def __init__(self, buffer: Any, indices_TK: Tensor, num_experts: int) -> None:
        self.buffer = buffer
        self.indices = indices_TK
        self.layout = buffer.get_dispatch_layout(indices_TK, num_experts)[:4]
        self.received_indices: Tensor
        self.handle: Any = None

    def first(self, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        per_rank, per_rdma_rank, per_expert, in_rank = self.layout
        rows_SD, self.received_indices, weights_SK, _, self.handle, _ = self.buffer.dispatch(
            x_TD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.indices,
            topk_weights=weights_TK,
        )
        return rows_SD, weights_SK


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, way: _Way) -> tuple[Tensor, Tensor]:
        ctx.way = way
        return way.first(x_TD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor, grad_SK: Tensor) -> tuple[Tensor, Tensor, None]:
        way = ctx.way
        grad_TD, grad_TK, _ = way.buffer.combine(
            grad_SD.contiguous(), way.handle, topk_weights=grad_SK.float().contiguous()
        )
        return grad_TD, grad_TK, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results_SD: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        y_TD: Tensor = way.buffer.combine(results_SD.contiguous(), way.handle)[0]
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        grad_SD: Tensor = way.buffer.dispatch(grad_TD.contiguous(), handle=way.handle)[0]
        return grad_SD, None

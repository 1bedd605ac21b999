"""The router of a mixture of experts: which experts a token goes to, by what weights, and the terms
that keep experts equally busy.

Computed in float32, whatever autocast says. Auxiliary losses enter by an identity on the weights
whose backward pass gives them their gradient, so no second output travels through the model. Their
values are exact under any split of the batch: the balancing loss is a mean over packed rows of
terms of one row each, the z-loss a mean over tokens, and capacity is per row. The mean over
processes of what each adds is the term of the global batch.
What happened is summed in `tally` by the same backward pass, once a token however often forward
passes are repeated; nothing of it is read back in a step. Left out: noise in the choice.

Legend: B rows, L tokens of a row, T = B x L tokens, D width, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from carillon.kernels.moe_routing.balance import load_balancing_loss, updated_selection_bias
from carillon.kernels.table import resolve

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """What all routers of a stack share."""

    width: int
    num_experts: int
    k: int
    score: Score = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_speed: float = 0.0
    capacity_factor: float | None = None

    def capacity(self, length: int) -> int | None:
        """Slots that an expert takes of a row of `length` tokens; none: all."""
        if self.capacity_factor is None:
            return None
        return max(1, math.ceil(self.capacity_factor * length * self.k / self.num_experts))


class Tally(NamedTuple):
    """Sums over the tokens of backward passes, in float64; slots are (E,), by expert."""

    slots: Tensor
    dropped: Tensor
    z_loss: Tensor
    tokens: Tensor
    balance_loss: Tensor
    rows: Tensor


class Router(nn.Module):
    """Chooses experts: (B, L, D) -> weights (T, K) float32 and indices (T, K) int32.

    Source: the choice and its weights in kernels/moe_routing/reference.py. Balancing loss of a row:
    DeepSeek-AI 2024 (DeepSeek-V3), eq. 17-20. z-loss: Zoph et al. 2022 (ST-MoE), eq. 5. Balance by
    a bias: DeepSeek-V3, section 2.1.2. Capacity: Fedus et al. 2021 (Switch), eq. 3, of one row.
    """

    bias: Tensor | None
    tally: Tensor

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.width))
        biased = shape.bias_speed > 0
        self.register_buffer("bias", torch.empty(shape.num_experts) if biased else None)
        size = shape.num_experts + len(Tally._fields) - 1
        tally = torch.empty(size, dtype=torch.float64)
        self.register_buffer("tally", tally, persistent=False)
        # What one forward pass sees of a process's batch: 1 / microbatches.
        self.batch_share = 1.0
        # Sums slots (B, E) over the processes that hold the other tokens of the same rows.
        self.sum_over_row: Callable[[Tensor], Tensor] = _alone

    def init_weights(self, *, std: float, generator: Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.zeros_(self.tally)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        shape, length = self.shape, x_BLD.shape[1]
        with torch.autocast(x_BLD.device.type, enabled=False):
            logits_BLE = F.linear(x_BLD.float(), self.weight.float())
        topk = resolve("moe_topk", x_BLD.device)
        # Where x is not finite its loss is not either, by which the step is skipped.
        logits_BLE = logits_BLE.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        settings = (shape.k, shape.score, shape.renormalize, shape.scale, self.bias)
        # One call a row gives the statistics of rows; the choice is the same.
        by_row = [topk(logits_LE, *settings) for logits_LE in logits_BLE.unbind(0)]
        weights_TK, indices_TK = (torch.cat([row[i] for row in by_row]) for i in (0, 1))
        if not torch.is_grad_enabled():
            return weights_TK, indices_TK
        slots_BE = torch.stack([row[2] for row in by_row])
        row_slots_BE = self.sum_over_row(slots_BE)
        balance = torch.stack(
            [
                load_balancing_loss(row[3], n_E)
                for row, n_E in zip(by_row, row_slots_BE, strict=True)
            ]
        )
        z_loss = torch.stack([row[4] for row in by_row])
        auxiliary = shape.balance_loss * balance.mean() + shape.z_loss * z_loss.mean()
        capacity = shape.capacity(length)
        over_BE = torch.zeros_like(slots_BE) if capacity is None else slots_BE - capacity
        tally = _tally(
            slots_BE.sum(0),
            dropped=over_BE.clamp(min=0),
            z_loss=z_loss * length,
            tokens=torch.full_like(z_loss, length),
            balance_loss=balance,
            rows=torch.ones_like(balance),
        )
        return _inject(weights_TK, auxiliary, self.batch_share, tally, self.tally), indices_TK

    def tallied(self, sums: Tensor | None = None) -> Tally:
        """What has been summed since it was last zeroed, or those sums over more processes."""
        sums = self.tally if sums is None else sums
        return Tally(sums[: self.shape.num_experts], *sums[self.shape.num_experts :])

    @torch.no_grad()
    def balance_(self, slots_E: Tensor) -> None:
        """Move the bias against the global batch's load; called after a step."""
        if self.bias is not None:
            self.bias.copy_(updated_selection_bias(self.bias, slots_E, self.shape.bias_speed))


def _alone(slots_BE: Tensor) -> Tensor:
    return slots_BE


def _tally(slots_E: Tensor, **parts: Tensor) -> Tensor:
    sums = {name: part.detach().double().sum().unsqueeze(0) for name, part in parts.items()}
    return torch.cat(Tally(slots_E.double(), **sums))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its backward pass fills a buffer
def _inject(
    weights_TK: Tensor, auxiliary: Tensor, share: float, tally: Tensor, into: Tensor
) -> Tensor:
    weights_TK = _Inject.apply(weights_TK, auxiliary, share, tally, into)  # type: ignore[no-untyped-call]
    return weights_TK


class _Inject(torch.autograd.Function):
    """The identity; backward gives the auxiliary loss the gradient `share`, and adds the tally."""

    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, auxiliary: Tensor, share: float, tally: Tensor, into: Tensor
    ) -> Tensor:
        ctx.share, ctx.tally, ctx.into = share, tally, into
        ctx.auxiliary = auxiliary.new_empty(())
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        ctx.into.add_(ctx.tally)
        return grad_TK, torch.full_like(ctx.auxiliary, ctx.share), None, None, None

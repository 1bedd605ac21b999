"""A mixture of experts in place of a block's MLP: a router, routed experts, and shared ones.

Tokens are laid out by expert (moe_plan), so that each projection is one grouped product over all
experts. Dropless by default; with a capacity an expert takes its first slots of each packed row in
token order, and a dropped slot adds nothing. How tokens get to their experts and back is
`Moe.dispatch`, a function that a layout with experts on many processes replaces.

Legend: B rows, L tokens of a row, T = B x L tokens, D width, E experts, K experts of a token, F
hidden features of an expert, R rows laid out by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from carillon.engine.nn.router import Router, RouterShape
from carillon.engine.nn.swiglu import SwiGlu, gated
from carillon.kernels.table import resolve

ALIGNMENT = 16  # rows of an expert are padded to this: what tiles of a grouped product want


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """What all mixtures of a stack share."""

    router: RouterShape
    expert_width: int
    shared_experts: int = 0


class Plan(NamedTuple):
    """Where slots stand among rows that are laid out by expert: what moe_plan gives.

    Shapes: (E + 1,), (R,) and (T, K), int32.
    """

    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor


class Experts(nn.Module):
    """All routed experts, each a SwiGLU: (T, D) and a plan -> (R, D), rows laid out by expert.

    Matrices are (E, in, out), and the outputs of the first one are (hidden, gate|up), as SwiGlu's.
    Source: Shazeer 2020, eq. 6; Gale et al. 2022 (MegaBlocks) for products without padding.
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        # From a parameter to the share of it that this process multiplies by.
        self.own_share: Callable[[Tensor], Tensor] = _whole

    def init_weights(
        self, *, std: float, residual_std: float, generator: Generator | None = None
    ) -> None:
        nn.init.normal_(self.gate_up, std=std, generator=generator)
        nn.init.normal_(self.down, std=residual_std, generator=generator)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        gate_up_EDF, down_EFD = (
            self.own_share(weight).to(x_TD.dtype) for weight in (self.gate_up, self.down)
        )
        gather_multiply = resolve("gather_grouped_mm", x_TD.device)
        hidden_RF = gated(gather_multiply(x_TD, gate_up_EDF, *plan))
        out_RD: Tensor = resolve("grouped_mm", x_TD.device)(hidden_RF, down_EFD, plan.offsets)
        return out_RD


class Slots(NamedTuple):
    """The experts (T, K) of the tokens of `num_rows` rows; how many an expert takes of a row."""

    indices: Tensor
    num_rows: int
    num_experts: int
    capacity: int | None

    def plan(self, alignment: int) -> Plan:
        """Rows by expert; with a capacity, by row inside an expert, each padded to alignment."""
        plan = resolve("moe_plan", self.indices.device)
        if self.capacity is None or self.num_rows == 1:
            return Plan(*plan(self.indices, self.num_experts, alignment, self.capacity))
        num_tokens = len(self.indices)
        row_T = torch.arange(num_tokens, device=self.indices.device, dtype=torch.int32)
        row_T = row_T // (num_tokens // self.num_rows)
        groups_TK = self.indices * self.num_rows + row_T[:, None]
        num_groups = self.num_experts * self.num_rows
        offsets, *maps = plan(groups_TK, num_groups, alignment, self.capacity)
        return Plan(offsets[:: self.num_rows].contiguous(), *maps)


# Takes x (T, D), weights (T, K), slots and experts; gives (T, D).
Dispatch = Callable[[Tensor, Tensor, Slots, Experts], Tensor]


def dispatch_here(x_TD: Tensor, weights_TK: Tensor, slots: Slots, experts: Experts) -> Tensor:
    """All experts are on this process."""
    plan = slots.plan(ALIGNMENT)
    y_TD: Tensor = resolve("moe_unpermute", x_TD.device)(
        experts(x_TD, plan), weights_TK, plan.row_to_slot, plan.slot_to_row
    )
    return y_TD


class Moe(nn.Module):
    """Mixture of experts: (B, L, D) -> (B, L, D).

    Shared experts see every token; they are one SwiGlu of their widths together. Source: Dai et al.
    2024 (DeepSeekMoE), section 3.
    """

    dispatch: Dispatch

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        width = shape.router.width
        self.router = Router(shape.router)
        self.experts = Experts(shape.router.num_experts, width, shape.expert_width)
        hidden = shape.shared_experts * shape.expert_width
        self.shared = SwiGlu(width, hidden) if hidden else None
        self.dispatch = dispatch_here

    def init_weights(
        self, *, std: float, residual_std: float, generator: Generator | None = None
    ) -> None:
        self.router.init_weights(std=std, generator=generator)
        self.experts.init_weights(std=std, residual_std=residual_std, generator=generator)
        if self.shared is not None:
            self.shared.init_weights(std=std, residual_std=residual_std, generator=generator)

    def forward(self, x_BLD: Tensor) -> Tensor:
        weights_TK, indices_TK = self.router(x_BLD)
        shape, (num_rows, length) = self.router.shape, x_BLD.shape[:2]
        slots = Slots(indices_TK, num_rows, shape.num_experts, shape.capacity(length))
        x_TD = x_BLD.flatten(0, 1).to(_product_dtype(x_BLD))
        y_BLD = self.dispatch(x_TD, weights_TK, slots, self.experts).view(x_BLD.shape)
        return y_BLD if self.shared is None else y_BLD + self.shared(x_BLD)


def _whole(weight: Tensor) -> Tensor:
    return weight


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would give the inputs of a product; it does not know ours."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

"""The gated MLP of a decoder block.

Gate and up projection are one linear. Its rows are (hidden, gate|up): a plain split of dim 0 then
hands a tensor-parallel rank both halves of its hidden features.

Legend: D width, F hidden features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Generator, Tensor, nn


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases: (..., width) -> (..., width).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def init_weights(
        self, *, std: float, residual_std: float, generator: Generator | None = None
    ) -> None:
        nn.init.normal_(self.gate_up.weight, std=std, generator=generator)
        nn.init.normal_(self.down.weight, std=residual_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(gated(self.gate_up(x)))
        return y


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of features that lie (hidden, gate|up): (..., 2F) -> (..., F)."""
    # The size is spelled out: experts may get no rows.
    gate, up = x.view(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    return F.silu(gate) * up

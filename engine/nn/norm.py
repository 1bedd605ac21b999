"""Layer normalisation, with statistics of both moments or of the second alone.

Under bf16 autocast the residual stream stays fp32 (parameters and sums are fp32, only matmul inputs
are cast), so statistics are taken over fp32 inputs, and the result is cast once by the linear that
reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """LayerNorm over the last dim: (..., width) -> (..., width).

    Source: Ba et al. 2016, "Layer Normalization".
    """

    def __init__(self, width: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if x.dtype is torch.float32:  # a sharded model may gather them in bf16
            weight, bias = weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a gain, over the last dim: (..., width) -> (..., width).

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Of one type the fused kernel is taken; it computes in fp32 whatever that is.
        return F.rms_norm(x, (self.width,), self.weight.to(x.dtype), self.eps)

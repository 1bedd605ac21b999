"""The two-layer perceptron of a transformer block and its activations.

Left out: gated variants and dropout, which no published CLIP uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Activation = Literal["gelu", "quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). Source: Hendrycks & Gimpel 2016, section 2; the OpenAI CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Mlp(nn.Module):
    """Linear, activation, linear: (..., width) -> (..., out_width, by default width)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        out_width: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, out_width or width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def init_weights(
        self, *, fc1_std: float, fc2_std: float, generator: Generator | None = None
    ) -> None:
        for linear, std in ((self.fc1, fc1_std), (self.fc2, fc2_std)):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y

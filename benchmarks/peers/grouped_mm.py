"""Peers of grouped_mm: (x, weights, offsets) -> products of rows in segments.

- `torch._grouped_mm`: on a GPU, in bfloat16.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def available(device: str, dtype: torch.dtype) -> dict[str, GroupedProduct]:
    """The peers that run on `device`, by name."""
    return {} if missing(device, dtype) else {"torch._grouped_mm": _of_torch}


def missing(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    if not hasattr(torch, "_grouped_mm"):
        return {"torch._grouped_mm": f"torch {torch.__version__} has none"}
    if not device.startswith("cuda") or dtype != torch.bfloat16:
        return {"torch._grouped_mm": f"it takes bfloat16 on a GPU, not {dtype} on {device}"}
    return {}


def _of_torch(x_RD: Tensor, weights_EDF: Tensor, offsets: Tensor) -> Tensor:
    """It takes the ends of segments; rows past the last are not defined."""
    return torch._grouped_mm(x_RD, weights_EDF, offs=offsets[1:].contiguous())

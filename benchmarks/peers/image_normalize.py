"""Peers of image_normalize: (images_NHWC, mean, std, dtype) -> planes.

- `torch`: one converting copy, one multiply-add in place, one cast: the least that torch needs.
- `torch.compile`: the same, compiled.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peers.compiling import compiled

Normalize = Callable[[Tensor, Sequence[float], Sequence[float], torch.dtype], Tensor]


def available(device: str) -> dict[str, Normalize]:
    """The peers by name; all run on any device."""
    return {"torch": composition, "torch.compile": compiled(composition)}


def missing(device: str) -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    return {}


def composition(
    images_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    mean_C, std_C = (torch.tensor(one, device=images_NHWC.device) for one in (mean, std))
    scale = (1 / (255 * std_C)).view(3, 1, 1)
    shift = (-mean_C / std_C).view(3, 1, 1)
    planes = images_NHWC.permute(0, 3, 1, 2)
    out = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.addcmul(shift, out, scale, out=out).to(dtype)

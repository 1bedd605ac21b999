"""Peers of image_normalize: (images, mean, std, dtype) -> normalised planes.

- `composition`: the least torch needs: one converting copy, one multiply-add in place, one cast.
- `composition compiled`: the same by torch.compile.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peers.compiling import compiled

Normalize = Callable[[Tensor, Sequence[float], Sequence[float], torch.dtype], Tensor]


def available(device: str) -> dict[str, Normalize]:
    """The peers by name; all run on any device."""
    return {"composition": composition, "composition compiled": compiled(composition)}


def missing(device: str) -> dict[str, str]:
    """Why a peer cannot run here, by name."""
    return {}


def composition(
    images_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    deviation = torch.tensor(std, device=images_NHWC.device).view(3, 1, 1)
    scale = 1 / (255 * deviation)
    shift = -torch.tensor(mean, device=images_NHWC.device).view(3, 1, 1) / deviation
    planes = images_NHWC.permute(0, 3, 1, 2)
    out = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.addcmul(shift, out, scale, out=out).to(dtype)

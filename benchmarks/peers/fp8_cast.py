"""Peers of fp8_cast: (x, granularity, scale) -> e4m3 codes and scales of both copies.

x is a matrix whose sizes are multiples of 128; scale, one float32 value or None, is that of
delayed scaling. Nothing here is differentiable, as the op is not.
- `float32`: abs, amax, div, clamp, to, computed in float32 as the op does.
- `bfloat16`: the same in bfloat16, which is cheaper and rounds twice.
- `... compiled`: the same by torch.compile.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from carillon.kernels.fp8_cast.layout import BLOCK
from carillon.kernels.fp8_cast.reference import FP8_MAX
from peers.compiling import compiled

E4M3 = torch.float8_e4m3fn
Cast = Callable[[Tensor, str, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]


def available(device: str) -> dict[str, Cast]:
    """The peers that run on `device`, by name."""
    peers: dict[str, Cast] = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        peers[name] = partial(composition, dtype=dtype)
        peers[f"{name} compiled"] = partial(compiled(composition), dtype=dtype)
    left_out = missing(device)
    return {name: peer for name, peer in peers.items() if name not in left_out}


def missing(device: str) -> dict[str, str]:
    """Why a peer is not run here, by name."""
    if device.startswith("cuda"):
        return {}
    slower = "on the CPU it has taken 2 to 4 times as long as `float32 compiled`"
    return {"bfloat16 compiled": slower}


def composition(
    x: Tensor, granularity: str, scale: Tensor | None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row copy, its scales, column copy, its scales."""
    x = x.to(dtype)
    row, row_scale = _quantised(x, granularity, scale)
    if granularity in ("tensorwise", "128x128"):
        return row, row_scale, row.t().contiguous(), row_scale.t()
    return row, row_scale, *_quantised(x.t().contiguous(), granularity, scale)


def _quantised(x: Tensor, granularity: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    height, width = {
        "tensorwise": x.shape,
        "rowwise": (1, x.shape[1]),
        "1x128": (1, BLOCK),
        "128x128": (BLOCK, BLOCK),
    }[granularity]
    groups = x.view(x.shape[0] // height, height, x.shape[1] // width, width)
    largest = FP8_MAX[E4M3]
    if scale is None:
        scale = groups.abs().amax((1, 3), keepdim=True) / largest
    else:
        scale = scale.to(x.dtype).view(1, 1, 1, 1)
    codes = groups.div(scale).clamp_(-largest, largest).to(E4M3)
    return codes.view(x.shape), scale.squeeze((1, 3))

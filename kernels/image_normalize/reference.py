"""Definition of image_normalize: uint8 pictures to normalised planes, in plain torch.

Shape suffixes: N pictures, H rows, W columns, C channels (3: red, green, blue).
The inputs are integers, so the op has no gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_CHANNELS = 3
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


def image_normalize(
    images_NHWC: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Computes (x / 255 - mean) / std per channel and moves the channels first.

    Shapes: images (N, H, W, 3) uint8, any strides -> (N, 3, H, W), contiguous.
    Computed in float32 and rounded once to `dtype`: float32 or bfloat16. Deterministic.

    Raises:
        ValueError: another shape or dtype, other than 3 values of mean and std, a mean or std
            that is not finite, or a std that is not positive.
    """
    check(images_NHWC, mean, std, dtype)
    device = images_NHWC.device
    mean_C = torch.tensor(mean, dtype=torch.float32, device=device)
    std_C = torch.tensor(std, dtype=torch.float32, device=device)
    out_NHWC = (images_NHWC.to(torch.float32) / 255 - mean_C) / std_C
    return out_NHWC.permute(0, 3, 1, 2).contiguous().to(dtype)


def check(
    images_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> None:
    """Raises ValueError, saying what was given and what is allowed."""
    if images_NHWC.dtype != torch.uint8:
        raise ValueError(f"image_normalize: images must be uint8, got {images_NHWC.dtype}")
    if images_NHWC.dim() != 4 or images_NHWC.shape[3] != NUM_CHANNELS:
        raise ValueError(
            "image_normalize: images must have the shape (N, H, W, 3), "
            f"got {tuple(images_NHWC.shape)}"
        )
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"image_normalize: dtype must be float32 or bfloat16, got {dtype}")
    if len(mean) != NUM_CHANNELS or len(std) != NUM_CHANNELS:
        raise ValueError(
            f"image_normalize: mean and std must have 3 values, got {len(mean)} and {len(std)}"
        )
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise ValueError(
            "image_normalize: mean must be finite and std finite and positive, "
            f"got {list(mean)} and {list(std)}"
        )

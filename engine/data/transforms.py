"""Pictures to model input: random resized crop, colour jitter and flip for training, resize and
centre crop for evaluation. Everything stays uint8 HWC in the workers (a quarter of the bytes to
move); the fused `image_normalize` op turns a batch into normalised NCHW on the model's device.
Randomness comes from the caller's generator, which is keyed by position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carillon.engine.config import changed, setting
from carillon.kernels.table import resolve

Picture = NDArray[np.uint8]

# Published CLIP statistics (Radford et al. 2021, reference preprocessing).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class ImageAugmentConfig:
    """`data.augment.image`."""

    randcrop: bool = setting(True, "Random resized crop; without it the evaluation crop is used.")
    min_scale: float = setting(
        0.5, "Smallest share of the area that a crop keeps.", min=0.01, max=16
    )
    max_scale: float = setting(
        1.0,
        "Largest share; above 1 the picture shrinks onto a border of its corners' colour.",
        min=0.01,
        max=16,
    )
    max_aspect: float = setting(1.3333, "Largest stretch of a crop's sides.", min=1, max=4)
    color_jitter: float = setting(
        0.0, "Brightness, contrast and saturation vary by this share.", min=0, max=1
    )
    flip: bool = setting(False, "Mirror half of the pictures; off, for pictures hold text.")

    def check(self) -> Iterator[str]:
        if self.max_scale < self.min_scale:
            yield f"max_scale: {self.max_scale:g} is less than min_scale ({self.min_scale:g})"
        unused = changed(self, "min_scale", "max_scale", "max_aspect")
        if unused and not self.randcrop:
            yield f"randcrop: false leaves {', '.join(unused)} without effect; drop either"


def train_transform(
    image: Picture, size: int, config: ImageAugmentConfig, generator: np.random.Generator
) -> Picture:
    """One augmented picture.

    Shapes: (H, W, 3) uint8 -> (size, size, 3) uint8, contiguous.
    Source: the random resized crop of Szegedy et al. 2014, section 6, as common since.
    """
    if config.randcrop:
        box = _random_box(image.shape[1], image.shape[0], config, generator)
        pixels = _crop(image, size, box)
    else:
        pixels = _centre_square(image, size)
    if config.flip and generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    if config.color_jitter > 0:
        pixels = _jitter(pixels, config.color_jitter, generator)
    return np.ascontiguousarray(pixels)


def needed_side(size: int, config: ImageAugmentConfig) -> int:
    """Shorter side, in pixels, below which a training crop to `size` would be enlarged."""
    if not config.randcrop:
        return size
    return math.ceil(size * math.sqrt(config.max_aspect / min(config.min_scale, 1.0)))


def eval_transform(image: Picture, size: int) -> Picture:
    """The largest centred square, resized. Shapes: (H, W, 3) uint8 -> (size, size, 3) uint8."""
    return _centre_square(image, size)


def _centre_square(image: Picture, size: int) -> Picture:
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W), standardised by the CLIP statistics."""
    normalized: Tensor = resolve("image_normalize", images.device)(images, MEAN, STD, dtype)
    return normalized


def _random_box(
    width: int, height: int, config: ImageAugmentConfig, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    stretch = math.log(config.max_aspect)
    for _ in range(8):
        share = generator.uniform(config.min_scale, config.max_scale)
        area = height * width * share
        aspect = math.exp(generator.uniform(-stretch, stretch))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if share > 1 or (w <= width and h <= height):
            # A box larger than the picture lies anywhere around it: the offset is then negative.
            left, top = generator.random() * (width - w), generator.random() * (height - h)
            return left, top, left + w, top + h
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _crop(image: Picture, size: int, box: tuple[float, float, float, float]) -> Picture:
    """The box of the picture, on a border where the box reaches past it."""
    height, width = image.shape[:2]
    left = min(max(round(box[0]), 0), width - 1)
    top = min(max(round(box[1]), 0), height - 1)
    right = max(min(round(box[2]), width), left + 1)
    bottom = max(min(round(box[3]), height), top + 1)
    inner = image[top:bottom, left:right]
    if box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height:
        return resize(inner, size, size)
    x_scale, y_scale = size / (box[2] - box[0]), size / (box[3] - box[1])
    w = min(size, max(1, round((right - left) * x_scale)))
    h = min(size, max(1, round((bottom - top) * y_scale)))
    x = min(round((left - box[0]) * x_scale), size - w)
    y = min(round((top - box[1]) * y_scale), size - h)
    out = np.empty((size, size, 3), dtype=np.uint8)
    out[:] = _corner_colour(image)
    out[y : y + h, x : x + w] = resize(inner, h, w)
    return out


def _corner_colour(image: Picture) -> NDArray[np.uint8]:
    """Per channel, the median (the mean of the middle two) of the four corner pixels."""
    corners = np.sort(image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int), axis=0)
    median: NDArray[np.uint8] = (corners[1:3].sum(axis=0) // 2).astype(np.uint8)
    return median


def resize(image: Picture, height: int, width: int) -> Picture:
    """Bicubic with a low-pass filter as wide as the reduction asks for.

    torch's operator on bytes is Pillow's algorithm in vector instructions, several times faster:
    the same bytes but for the rounding of an intermediate row (3 levels at most were seen).
    """
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        planes, (height, width), mode="bicubic", antialias=True
    )
    pixels: Picture = resized[0].permute(1, 2, 0).numpy()
    return pixels


def _jitter(image: Picture, amount: float, generator: np.random.Generator) -> Picture:
    """Brightness, contrast and saturation as one affine map of colours, in one pass."""
    brightness, contrast, saturation = generator.uniform(1 - amount, 1 + amount, size=3)
    mix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMINANCE[:, None]
    pixels = image.reshape(-1, 3).astype(np.float32)
    mean = float(pixels.mean(axis=0) @ _LUMINANCE) * brightness
    out = pixels @ (brightness * contrast * mix).astype(np.float32)
    out += np.float32((1 - contrast) * mean + 0.5)  # the half rounds when the fraction is cut
    np.clip(out, 0, 255, out=out)
    jittered: Picture = out.astype(np.uint8).reshape(image.shape)
    return jittered

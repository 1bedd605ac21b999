"""Pictures at their own shapes as patches: shrunk to a number of patches, never made square.

Source: NaViT (Dehghani et al. 2023), section 2.1: the aspect ratio is kept, positions are two
coordinates, and pictures of all shapes stand one after another in a sequence.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carillon.engine.data.transforms import Picture, resize


def grid_of(height: int, width: int, *, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of so many pixels: at most `most` patches, none
    larger than the picture asks for, at least one each way."""
    shrunk = min(1.0, math.sqrt(most * patch * patch / (height * width)))
    rows = min(most, max(1, round(height * shrunk / patch)))
    columns = min(most, max(1, round(width * shrunk / patch)))
    while rows * columns > most:  # rounding took one too many
        if rows > columns:
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def patches_of(image: Picture, grid: tuple[int, int], patch: int) -> NDArray[np.uint8]:
    """Resized to the grid and cut. Shapes: (H, W, 3) -> (rows x columns, patch x patch x 3), row by
    row, the pixels of a patch row by row."""
    rows, columns = grid
    pixels = resize(image, rows * patch, columns * patch)
    cut = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    flat: NDArray[np.uint8] = np.ascontiguousarray(cut).reshape(rows * columns, -1)
    return flat


def places_of(grid: tuple[int, int], frame: int = 0) -> NDArray[np.int32]:
    """Frame, row and column of each patch of `patches_of`: (rows x columns, 3)."""
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return np.stack([np.full_like(row, frame), row, column], axis=1)

"""What a picture is compared by: a small thumbnail, and vectors that stand for parts of it.

The signature is the picture squeezed to 32 x 32 brightnesses and 8 x 8 of each colour difference
(1,152 bytes). From it follow unit vectors of low-frequency cosines, weighted up with frequency,
since brightness of natural pictures falls off as fast. Every vector is a fixed linear map of the
thumbnail. A cropped copy is found since the whole copy is compared with ten views of the original:
the whole, and windows of 90% at nine places. A perceptual hash keeps one bit of each cosine and
sees the whole alone: at equal precision it loses most of the crops (benchmarks/results).
Left out: mirrored and turned copies.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE, COLOUR_SIDE = 32, 8
SIGNATURE_BYTES = SIDE * SIDE + 2 * COLOUR_SIDE * COLOUR_SIDE
_NUM_COSINES, _VIEW_SIDE = 8, 16
DIMS = _NUM_COSINES * _NUM_COSINES - 1  # without the mean

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Window(NamedTuple):
    """A part of a picture, in shares of its sides."""

    top: float
    left: float
    height: float
    width: float


WHOLE = Window(0.0, 0.0, 1.0, 1.0)
VIEWS = (WHOLE, *(Window(top, left, 0.9, 0.9) for top in (0, 0.05, 0.1) for left in (0, 0.05, 0.1)))


def picture_signature(pixels: Bytes) -> bytes:
    """The signature of a decoded picture. Shapes: (H, W, 3) uint8 -> SIGNATURE_BYTES."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
    brightness, *colours = small.split()
    coarse = [c.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX) for c in colours]
    return b"".join(channel.tobytes() for channel in (brightness, *coarse))


def brightness_of(signatures: Bytes) -> Bytes:
    """Shapes: (N, SIGNATURE_BYTES) -> (N, SIDE, SIDE)."""
    return signatures[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)


def colours_of(signatures: Bytes) -> Bytes:
    """Shapes: (N, SIGNATURE_BYTES) -> (N, 2, COLOUR_SIDE, COLOUR_SIDE)."""
    return signatures[:, SIDE * SIDE :].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE)


def view_vectors(signatures: Bytes, view: int) -> Float32:
    """Unit vectors of one view. Shapes: (N, SIGNATURE_BYTES) -> (N, DIMS)."""
    flat = signatures[:, : SIDE * SIDE].astype(np.float32)
    vectors = flat @ _view_map(view).T
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A picture of one colour has no structure: its vector is zero and near to nothing.
    return np.asarray(np.where(lengths > 1.0, vectors / np.maximum(lengths, 1.0), 0.0))


def averaging(num_cells: int, starts: Any, lengths: Any, num_out: int) -> Any:
    """Matrices that average cells over windows. Shapes: (P,), (P,) -> (P, num_out, num_cells)."""
    starts, lengths = np.asarray(starts, np.float32), np.asarray(lengths, np.float32)
    edges = np.linspace(0, 1, num_out + 1, dtype=np.float32)
    edges = num_cells * (starts[:, None] + lengths[:, None] * edges)
    cells = np.arange(num_cells, dtype=np.float32)
    upper = np.minimum(edges[:, 1:, None], cells + 1)
    covered = np.clip(upper - np.maximum(edges[:, :-1, None], cells), 0, None)
    return covered / covered.sum(axis=2, keepdims=True)


@cache
def _view_map(view: int) -> Float32:
    """The linear map from brightness to the weighted cosines of a view."""
    window = VIEWS[view]
    rows = _cosines() @ averaging(SIDE, [window.top], [window.height], _VIEW_SIDE)[0]
    columns = _cosines() @ averaging(SIDE, [window.left], [window.width], _VIEW_SIDE)[0]
    order = np.arange(_NUM_COSINES)
    weights = np.sqrt(np.add.outer(order**2, order**2)).reshape(-1, 1)
    return np.asarray((np.kron(rows, columns) * weights)[1:], np.float32)


def _cosines() -> Any:
    place, order = np.arange(_VIEW_SIDE), np.arange(_NUM_COSINES)[:, None]
    scale = np.where(order == 0, np.sqrt(1 / _VIEW_SIDE), np.sqrt(2 / _VIEW_SIDE))
    return scale * np.cos(np.pi * (2 * place + 1) * order / (2 * _VIEW_SIDE))

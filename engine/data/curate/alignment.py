"""How alike two pictures are once one is laid over the part of the other that it shows.

The window starts where the search found it and is moved and stretched, a step at a time, towards
the highest correlation of brightness, for many pairs at once. Then three things are measured, each
blind to what the others see: correlation of the whole, the worst of 36 patches (a clock's hand, a
changed word), and colour. Left out: windows below 75% of a side.

Legend: P pairs, S the side compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from carillon.engine.data.curate.picture_signature import (
    COLOUR_SIDE,
    SIDE,
    VIEWS,
    Bytes,
    averaging,
    brightness_of,
    colours_of,
)

_COMPARED, _PATCH = 24, 4
_STEPS = (0.04, 0.02, 0.01)
_MIN_SHARE = 0.75
_MIN_CONTRAST = 2.0  # of 255: below it brightness is noise


class Likeness(NamedTuple):
    """Of each pair: correlation in [-1, 1]; differences in levels of 255.

    Shapes: (P,) each.
    """

    correlation: Any
    worst_patch: Any
    colour: Any


def likeness(whole: Bytes, larger: Bytes, views: Any) -> Likeness:
    """Compare pictures with windows of others, starting at a view of each.

    Shapes: (P, SIGNATURE_BYTES), (P, SIGNATURE_BYTES), (P,).
    """
    target = _shrunk(brightness_of(whole).astype(np.float32))
    source = brightness_of(larger).astype(np.float32)
    windows = np.asarray([VIEWS[view] for view in views], np.float32).reshape(-1, 4)
    windows, correlation = _aligned(target, source, windows)
    found = _seen(source, windows, _COMPARED)
    colour_windows = _seen(colours_of(larger).astype(np.float32), windows, COLOUR_SIDE)
    colour = np.abs(colour_windows - colours_of(whole)).mean(axis=(1, 2, 3))
    return Likeness(correlation, _worst_patch(target, found), colour)


def _aligned(target: Any, source: Any, windows: Any) -> tuple[Any, Any]:
    """Climb to the window of the highest correlation; returns windows and correlations."""
    best = _correlation(target, _seen(source, windows, _COMPARED))
    for step in _STEPS:
        for _ in range(2):
            for move in _moves(step):
                moved = _inside(windows + move)
                value = _correlation(target, _seen(source, moved, _COMPARED))
                better = value > best
                windows = np.where(better[:, None], moved, windows)
                best = np.where(better, value, best)
    return windows, best


def _moves(step: float) -> Any:
    """Shifts along each side, and stretches of each side about its middle."""
    moves: list[tuple[float, ...]] = []
    for sign in (step, -step):
        moves += [(sign, 0, 0, 0), (0, sign, 0, 0)]
        moves += [(-sign / 2, 0, sign, 0), (0, -sign / 2, 0, sign), (-sign / 2,) * 2 + (sign,) * 2]
    return np.asarray(moves, np.float32)


def _inside(windows: Any) -> Any:
    shares = np.clip(windows[:, 2:], _MIN_SHARE, 1.0)
    return np.concatenate([np.clip(windows[:, :2], 0.0, 1.0 - shares), shares], axis=1)


def _seen(source: Any, windows: Any, side: int) -> Any:
    """What windows show. Shapes: (P, ..., n, n), (P, 4) -> (P, ..., side, side)."""
    rows = averaging(source.shape[-1], windows[:, 0], windows[:, 2], side)
    columns = averaging(source.shape[-1], windows[:, 1], windows[:, 3], side)
    if source.ndim == 4:
        rows, columns = rows[:, None], columns[:, None]
    return rows @ source @ np.swapaxes(columns, -1, -2)


def _shrunk(brightness: Any) -> Any:
    whole = np.tile(np.asarray([[0, 0, 1, 1]], np.float32), (len(brightness), 1))
    return _seen(brightness, whole, _COMPARED)


def _correlation(one: Any, other: Any) -> Any:
    one = one - one.mean(axis=(1, 2), keepdims=True)
    other = other - other.mean(axis=(1, 2), keepdims=True)
    floor = np.float32((_MIN_CONTRAST * _COMPARED) ** 2)
    scale = np.sqrt(
        np.maximum((one * one).sum(axis=(1, 2)), floor)
        * np.maximum((other * other).sum(axis=(1, 2)), floor)
    )
    return (one * other).sum(axis=(1, 2)) / scale


def _worst_patch(one: Any, other: Any) -> Any:
    """The mean difference in the patch where it is greatest, both at equal brightness."""
    shift = (one - other).mean(axis=(1, 2), keepdims=True)
    num = _COMPARED // _PATCH
    patches = np.abs(one - other - shift).reshape(-1, num, _PATCH, num, _PATCH)
    return patches.mean(axis=(2, 4)).max(axis=(1, 2))


assert SIDE % COLOUR_SIDE == 0

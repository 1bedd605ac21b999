"""Which frames of a video are taken, as a function of the times of all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_TICKS = 10_000_000  # more than any limit of frames


@dataclass(frozen=True)
class EveryFrame:
    """All frames of the window."""


@dataclass(frozen=True)
class UniformFrames:
    """`num_frames` frames, the middles of as many equal parts of the window's frames.

    A window of fewer frames gives all of them: no frame comes twice.
    """

    num_frames: int

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames: {self.num_frames} given, 1 or more is allowed")


@dataclass(frozen=True)
class FramesAtRate:
    """At each 1 / `frames_per_s` from the window's start, the frame that is shown then.

    A video with fewer frames a second gives each of them once.
    """

    frames_per_s: float

    def __post_init__(self) -> None:
        if not 0 < self.frames_per_s < float("inf"):
            raise ValueError(f"frames_per_s: {self.frames_per_s} given, more than 0 is allowed")


@dataclass(frozen=True)
class KeyFrames:
    """The frames that are stored whole; they cost the least."""


Sampling = EveryFrame | UniformFrames | FramesAtRate | KeyFrames


def chosen_frames(
    times_s: NDArray[np.float64],
    keyframe: NDArray[np.bool_],
    sampling: Sampling,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> NDArray[np.int64]:
    """Indices, rising, of the frames that `sampling` takes of those at start_s <= t < end.

    Shapes: times (T,), rising, and keyframe (T,).
    """
    tolerance_s = 1e-6  # times are multiples of a time base: never nearer than this
    end_s = np.inf if duration_s is None else start_s + duration_s
    first = int(np.searchsorted(times_s, start_s - tolerance_s))
    last = int(np.searchsorted(times_s, end_s - tolerance_s))
    window = np.arange(first, last)
    if isinstance(sampling, KeyFrames):
        return window[keyframe[first:last]]
    if isinstance(sampling, EveryFrame) or len(window) == 0:
        return window
    if isinstance(sampling, UniformFrames):
        count = min(sampling.num_frames, len(window))
        return first + (2 * np.arange(count) + 1) * len(window) // (2 * count)
    until_s = end_s if last < len(times_s) else min(end_s, float(times_s[-1]) + tolerance_s)
    num_ticks = min(np.ceil((until_s - start_s) * sampling.frames_per_s), _MAX_TICKS)
    wanted_s = start_s + np.arange(int(num_ticks)) / sampling.frames_per_s
    shown = np.searchsorted(times_s, wanted_s + tolerance_s, side="right") - 1
    return np.unique(np.clip(shown, first, last - 1))

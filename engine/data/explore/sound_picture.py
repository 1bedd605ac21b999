"""A sound as a picture: its waveform over its spectrogram.

The spectrogram has a column of Hann-windowed spectra for every few pixels, frequencies on the mel
scale up to half the rate, the lowest at the bottom, and RANGE_DB below the loudest as black.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WAVE_HEIGHT, SPECTRUM_HEIGHT = 96, 224
RANGE_DB = 80.0
_WINDOW_S = 0.032
_INK, _PAPER, _AXIS = (37, 99, 235), (244, 244, 245), (161, 161, 170)


def sound_picture(samples: NDArray[np.float32], rate: int, *, width: int) -> NDArray[np.uint8]:
    """Draw a sound of one channel. Shapes: samples (T,), T at least 1; gives (H, width, 3)."""
    return np.concatenate([_waveform(samples, width), _spectrogram(samples, rate, width)])


def _waveform(samples: NDArray[np.float32], width: int) -> NDArray[np.uint8]:
    """Each column from the lowest to the highest sample that falls on it."""
    edges = np.linspace(0, len(samples), width + 1)
    starts = np.minimum(edges[:-1].astype(np.int64), len(samples) - 1)
    low = np.minimum.reduceat(samples, starts)
    high = np.maximum.reduceat(samples, starts)
    middle = (WAVE_HEIGHT - 1) / 2
    top = np.round(middle - np.clip(high, -1, 1) * middle)
    bottom = np.round(middle - np.clip(low, -1, 1) * middle)
    rows = np.arange(WAVE_HEIGHT)[:, None]
    picture = np.full((WAVE_HEIGHT, width, 3), _PAPER, dtype=np.uint8)
    picture[WAVE_HEIGHT // 2] = _AXIS
    picture[(rows >= top) & (rows <= bottom)] = _INK
    return picture


def _spectrogram(samples: NDArray[np.float32], rate: int, width: int) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    length = 1 << int(np.ceil(np.log2(_WINDOW_S * rate)))
    centres = np.linspace(0, len(samples) - 1, width).astype(np.int64)
    padded = np.pad(samples, (length // 2, length // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[centres]
    power = np.abs(np.fft.rfft(frames * np.hanning(length), axis=1)) ** 2
    bins = _mel_rows(rate) / (rate / 2) * (power.shape[1] - 1)
    below = np.floor(bins).astype(np.int64)
    above = np.minimum(below + 1, power.shape[1] - 1)
    rest = bins - below
    rows = power[:, below] * (1 - rest) + power[:, above] * rest
    loudest = max(float(rows.max()), 1e-10)
    decibels = 10 * np.log10(np.maximum(rows / loudest, 10 ** (-RANGE_DB / 10)))
    shade = (1 + decibels / RANGE_DB).T[::-1]
    colours: NDArray[np.uint8] = colormaps["magma"](shade, bytes=True)
    return colours[..., :3]


def _mel_rows(rate: int) -> NDArray[np.float64]:
    """The frequency of each row, from the bottom, at even distances in mel."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    mel = np.linspace(0, top, SPECTRUM_HEIGHT)
    return np.asarray(700 * (10 ** (mel / 2595) - 1))

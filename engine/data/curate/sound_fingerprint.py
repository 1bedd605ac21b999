"""Fingerprints of sounds: which of 33 bands grow faster than the next, 21 times a second.

Source: Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (2002), with windows of
0.37 s every 46 ms. A bit says whether the difference of two neighbouring bands' energies rose since
the window before, so loudness and codecs change few bits. Sounds that share whole words of 32 bits
at one offset are compared bit by bit over what they share; a half of unlike sounds' bits differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

RATE = 8000
_WINDOW, _HOP = 2944, 368
_LOWEST_HZ, _HIGHEST_HZ, _NUM_BANDS = 300.0, 2000.0, 33
_MIN_WORDS = 16  # 0.7 s
_MAX_PLACES = 64  # a word in more places says nothing
_FEW_WORDS = 1 << 22  # of so many each meets one by chance in a thousand: then one suffices
_SILENCE = 1e-5


class SoundPair(NamedTuple):
    """Two sounds and the share of bits that differ where they overlap."""

    one: int
    other: int
    bit_errors: float


def fingerprint(samples: Any) -> bytes | None:
    """The words of a sound at RATE; none when it is silent or shorter than a second.

    Shapes: (n,) -> windows x 4 bytes.
    """
    if len(samples) < _WINDOW + _MIN_WORDS * _HOP or np.abs(samples).max() < _SILENCE:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP]
    spectrum = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW).astype(np.float32), axis=1)) ** 2
    edges = np.geomspace(_LOWEST_HZ, _HIGHEST_HZ, _NUM_BANDS + 1) * _WINDOW / RATE
    places = edges.astype(int)
    bands = np.stack([spectrum[:, a : max(b, a + 1)].sum(1) for a, b in pairwise(places)], 1)
    steps = np.diff(bands, axis=1)
    bits = np.diff(steps, axis=0) > 0
    return np.packbits(bits, axis=1).tobytes()


def near_sounds(prints: Sequence[bytes], *, max_bit_errors: float) -> Iterator[SoundPair]:
    """Pairs of sounds that share most of their bits over at least half of the shorter one."""
    words = [np.frombuffer(one, ">u4") for one in prints]
    for (one, other), offset in _candidates(words):
        a, b = words[one], words[other]
        start, end = max(0, offset), min(len(a), len(b) + offset)
        if 2 * (end - start) < min(len(a), len(b)):
            continue
        differ = a[start:end] ^ b[start - offset : end - offset]
        errors = np.unpackbits(differ.view(np.uint8)).mean()
        if errors <= max_bit_errors:
            yield SoundPair(one, other, float(errors))


def _candidates(words: Sequence[Any]) -> Iterator[tuple[tuple[int, int], int]]:
    """Pairs with the offset at which they share most words, in order."""
    if not words:
        return
    values = np.concatenate(words)
    owner = np.repeat(np.arange(len(words)), [len(one) for one in words])
    place = np.concatenate([np.arange(len(one)) for one in words])
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order].astype(np.int64), prepend=-1))
    votes: dict[tuple[int, int], Counter[int]] = {}
    for start, end in pairwise([*starts.tolist(), len(order)]):
        if not 2 <= end - start <= _MAX_PLACES:
            continue
        held = [(int(owner[at]), int(place[at])) for at in order[start:end]]
        for at, (other, behind) in enumerate(held):
            for one, before in held[:at]:
                if one != other:
                    votes.setdefault((one, other), Counter())[before - behind] += 1
    for pair in sorted(votes):
        offset, number = min(votes[pair].items(), key=lambda kv: (-kv[1], abs(kv[0]), kv[0]))
        if number >= (1 if len(values) <= _FEW_WORDS else 2):
            yield pair, offset

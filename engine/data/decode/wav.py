"""Plain WAVs, of whole numbers of 16 bits: their samples are the file's own bytes.

That is most of them, and several times as fast as by a library. Others are left to libsndfile
(audio.py); the samples are the same to the bit.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carillon.engine.data.decode.limits import AudioError

_PCM = 1
_STREAMED_BYTES = 0x7FFF_0000  # and above: written by who did not know the length


class WavHeader(NamedTuple):
    """What a plain WAV says of itself, and where its samples begin."""

    rate: int
    num_channels: int
    num_frames: int
    at: int


def wav_header(data: bytes) -> WavHeader | None:
    """The header of a plain WAV; none for another one. Raises AudioError as check_wav_length."""
    shape = None
    for name, at, size in _chunks(data):
        if name == b"fmt " and size >= 16 and at + 16 <= len(data):
            kind, num_channels, rate, _, width, bits = struct.unpack_from("<HHIIHH", data, at)
            if (kind, bits, width) != (_PCM, 16, 2 * num_channels) or num_channels == 0:
                return None
            shape = rate, num_channels
        if name == b"data":
            if shape is None:
                return None
            check_wav_length(data)
            num_bytes = min(size, len(data) - at)
            return WavHeader(*shape, num_bytes // (2 * shape[1]), at)
    return None


def wav_samples(data: bytes, header: WavHeader, first: int, count: int) -> NDArray[np.float32]:
    """(T, C): `count` samples from the `first` on, both within the header's."""
    stored = np.frombuffer(
        data, "<i2", count * header.num_channels, header.at + 2 * first * header.num_channels
    )
    samples: NDArray[np.float32] = np.multiply(stored, np.float32(2.0**-15), dtype=np.float32)
    return samples.reshape(-1, header.num_channels)


def check_wav_length(data: bytes) -> None:
    """Raises AudioError where a file says that it has more samples than bytes."""
    for name, at, size in _chunks(data):
        if name == b"data":
            if len(data) < at + size < _STREAMED_BYTES:
                raise AudioError(
                    f"the sound says that it has {at + size:,} bytes, but has {len(data):,}"
                )
            return


def _chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Name, place and size of what follows the file's header, up to the samples."""
    found, at = [], 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        found.append((name, at + 8, size))
        if name == b"data":
            break
        at += 8 + size + size % 2
    return found

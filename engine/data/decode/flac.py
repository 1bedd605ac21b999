"""A whole FLAC file by dr_flac (miniaudio), which takes half of the time that libsndfile does.

Windows, and files that do not state their length or begin with something else, are left to
libsndfile (audio.py). The samples are the same to the bit: both divide the integers by their range.
"""

from __future__ import annotations

from typing import NamedTuple

import miniaudio
import numpy as np
from numpy.typing import NDArray

from carillon.engine.data.decode.limits import AudioError

_STREAM_INFO = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")  # a block of 34 bytes; \x80: the only one
_BLOCK_END = 42


class FlacHeader(NamedTuple):
    """What a file says of itself; it may be wrong."""

    rate: int
    num_channels: int
    num_frames: int


def flac_header(data: bytes) -> FlacHeader | None:
    """The header of a file that begins as usual and states its length; else none."""
    if not data.startswith(_STREAM_INFO) or len(data) < _BLOCK_END:
        return None
    rate = int.from_bytes(data[18:21], "big") >> 4
    num_channels = ((data[20] >> 1) & 7) + 1
    num_frames = int.from_bytes(data[21:26], "big") & (2**36 - 1)
    return FlacHeader(rate, num_channels, num_frames) if num_frames else None


def decode_flac(data: bytes, header: FlacHeader) -> NDArray[np.float32]:
    """(T, C) samples. Takes as much memory as the header says: check that first.

    Raises AudioError for damaged bytes, or samples other than the header's.
    """
    try:
        sound = miniaudio.flac_read_f32(data)
    except miniaudio.MiniaudioError as error:
        raise AudioError(f"the sound cannot be decoded: {error}") from None
    samples = np.frombuffer(sound.samples, np.float32).reshape(-1, sound.nchannels)
    if (sound.sample_rate, sound.nchannels) != (header.rate, header.num_channels):
        raise AudioError("the sound is of another rate or other channels than it says")
    if len(samples) != header.num_frames:
        raise AudioError(
            f"the sound ends after {len(samples):,} of {header.num_frames:,} samples: "
            "damaged or cut"
        )
    return samples

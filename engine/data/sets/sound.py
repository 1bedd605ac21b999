"""Sound in and out of the sets: G.722 decoded, FLAC written, facts of any sound file read.

All of it by FFmpeg's libraries through PyAV. FLAC is written without the encoder's name, so the
bytes follow from the samples alone for one version of the library.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

SOUND_LIBRARY = f"PyAV {av.__version__}"

_Samples = np.ndarray[Any, np.dtype[np.int16]]
_FLAC_FRAME = 4096
_MAX_DURATION_S = 3600
_SILENT_PEAK = 1e-3  # of full scale: 60 dB below it


class SoundError(ValueError):
    """The bytes are no sound that can be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SoundFacts:
    """What `meta.media` says of a sound."""

    duration_s: float
    sample_rate: int
    num_channels: int

    def as_media(self, **more: str) -> dict[str, Any]:
        return {**asdict(self), **more}


def decode_g722(data: bytes) -> _Samples:
    """A raw G.722 stream of 64 kbit/s as 16 kHz mono samples. Raises SoundError."""
    try:
        with av.open(io.BytesIO(data), "r", format="g722") as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise SoundError(f"the G.722 sound cannot be decoded: {error}") from None
    if not frames:
        raise SoundError("the G.722 sound holds no samples")
    samples: _Samples = np.concatenate(frames, axis=1)[0]
    return samples


def encode_flac(samples: _Samples, sample_rate: int) -> bytes:
    """Mono 16-bit samples as FLAC."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=sample_rate, layout="mono", format="s16")
        assert isinstance(stream, AudioStream)
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for start in range(0, len(samples), _FLAC_FRAME):
            block = np.ascontiguousarray(samples[None, start : start + _FLAC_FRAME])
            frame = AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = sample_rate
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def facts_of(samples: _Samples, sample_rate: int) -> SoundFacts:
    """The facts of mono samples."""
    return SoundFacts(
        duration_s=round(len(samples) / sample_rate, 6), sample_rate=sample_rate, num_channels=1
    )


def read_facts(data: bytes) -> SoundFacts:
    """The facts of a sound file, its length counted by decoding it.

    Raises SoundError for what cannot be decoded, and for silence.
    """
    num_samples, peak = 0, 0.0
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.audio[0]
            sample_rate, num_channels = stream.rate, stream.channels
            for frame in container.decode(stream):
                num_samples += frame.samples
                peak = max(peak, _peak(frame))
                if num_samples > _MAX_DURATION_S * sample_rate:
                    raise SoundError(f"the sound is longer than {_MAX_DURATION_S} s")
    except (av.FFmpegError, IndexError) as error:
        raise SoundError(f"the sound cannot be decoded: {error}") from None
    if not num_samples or not sample_rate:
        raise SoundError("the sound holds no samples")
    if peak < _SILENT_PEAK:
        raise SoundError("the sound is silent")
    return SoundFacts(
        duration_s=round(num_samples / sample_rate, 6),
        sample_rate=sample_rate,
        num_channels=num_channels,
    )


def _peak(frame: AudioFrame) -> float:
    """The largest sample of a frame, of full scale."""
    samples = frame.to_ndarray()
    full = 1.0 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)
    return float(np.abs(samples.astype(np.float64)).max(initial=0.0)) / full

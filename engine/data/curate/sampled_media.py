"""As little of a sound or video as a fingerprint needs: samples at a low rate, a few frames.

Decoders are libsndfile (soundfile) and FFmpeg (PyAV). What a header says of sizes is checked before
memory is taken, and no more than MAX_S of sound is read. Raises ValueError with the reason for
bytes that cannot be used.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from carillon.engine.data.decode.image import MAX_PIXELS

MAX_S = 120.0
_MIN_RATE, _MAX_RATE, _MAX_CHANNELS = 4_000, 192_000, 16


def sound_samples(data: bytes, rate: int) -> Any:
    """The first MAX_S of a sound, channels averaged. Shapes: -> (n,) float32 at `rate`."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not _MIN_RATE <= file.samplerate <= _MAX_RATE or file.channels > _MAX_CHANNELS:
                raise ValueError(f"{file.samplerate} Hz in {file.channels} channels")
            wanted = int(MAX_S * file.samplerate)
            samples = file.read(min(wanted, max(0, file.frames)), "float32", always_2d=True)
            source_rate = file.samplerate
    # Readers of hostile bytes raise nearly anything.
    except Exception as error:
        raise ValueError(f"the sound cannot be decoded: {error}") from None
    if not len(samples) or not np.isfinite(samples).all():
        raise ValueError("the sound has no samples, or some that are not finite")
    return _resampled(samples.mean(axis=1), source_rate, rate)


def _resampled(samples: Any, source_rate: int, rate: int) -> Any:
    """Averages over what a new sample covers: a plain low pass suffices for energies of bands."""
    sums = np.concatenate([[0.0], np.cumsum(samples, dtype=np.float64)])
    number = int(len(samples) * rate / source_rate)
    edges = np.arange(number + 1) * (source_rate / rate)
    at = np.interp(edges, np.arange(len(sums)), sums)
    return (np.diff(at) * (rate / source_rate)).astype(np.float32)


def sampled_frames(data: bytes, number: int) -> list[Any]:
    """Frames at the middles of `number` equal parts of a video's frames. Shapes: (H, W, 3) each.

    Frames are counted by their packets: a header may lie. A short video has fewer.
    """
    import av

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"frames of {stream.width} x {stream.height} pixels")
            times = sorted(
                packet.pts for packet in container.demux(stream) if packet.pts is not None
            )
            if not times:
                raise ValueError("it has no frames")
            wanted = {times[(2 * at + 1) * len(times) // (2 * number)] for at in range(number)}
            container.seek(0)
            return _frames_at(container, stream, wanted)
    except Exception as error:
        raise ValueError(f"the video cannot be decoded: {error}") from None


def _frames_at(container: Any, stream: Any, wanted: set[int]) -> list[Any]:
    found = []
    for frame in container.decode(stream):
        if frame.pts in wanted:
            small = frame.to_image().convert("RGB")
            small.thumbnail((256, 256), Image.Resampling.BOX)
            found.append(np.asarray(small))
            if len(found) == len(wanted):
                break
    if not found:
        raise ValueError("none of its frames can be decoded")
    return found

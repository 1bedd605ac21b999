"""What a medium says of itself: its suffix by content, and its size, length and rates.

Pictures are decoded whole, since only that tells that they can be. Of sound and video the header
is read and its claims are checked for sense; whether each sample or frame can be decoded shows
when it is. A container can name other files to read on in: that is refused.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from carillon.engine.data.decode.image import ImageError, decode_rgb, picture_extension

_MIN_RATE, _MAX_RATE = 8_000, 192_000
_MAX_CHANNELS = 64
_UNKNOWN_FRAMES = 2**62  # what libsndfile says of a stream that does not state its length


class HeaderError(ValueError):
    """The bytes are no medium that can be used; the message says why."""


class Header(NamedTuple):
    """A medium's usual suffix and the facts that `meta.media` has of it."""

    suffix: str
    facts: dict[str, int | float]


def read_header(data: bytes) -> Header:
    """Raises HeaderError or ImageError for what is no medium that is known, or makes no sense."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _sound(data, "wav")
    if data.startswith(b"fLaC"):
        return _sound(data, "flac")
    if data.startswith(b"OggS"):
        return _sound(data, "ogg")
    if data[4:8] == b"ftyp":
        return _video(data, "mp4", "mov")
    if data.startswith(b"\x1aE\xdf\xa3"):
        return _video(data, "webm", "matroska")
    try:
        suffix = picture_extension(data)
    except ImageError:
        if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] >> 5 == 7):
            return _sound(data, "mp3")
        raise HeaderError(
            "not a JPEG, PNG, WebP, GIF or BMP picture, WAV, FLAC, OGG or MP3 sound, MP4 or WebM "
            f"video; it starts with {data[:8]!r}"
        ) from None
    width, height = decode_rgb(data).size
    return Header(suffix, {"width": width, "height": height})


def _sound(data: bytes, suffix: str) -> Header:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            start = file.read(1024, dtype="float32")
    # A decoder of hostile bytes may raise anything that its author did not foresee.
    except Exception as error:
        raise HeaderError(f"the sound cannot be decoded: {error}") from None
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise HeaderError(f"a sampling rate of {rate} Hz; {_MIN_RATE} to {_MAX_RATE} are allowed")
    if not 1 <= channels <= _MAX_CHANNELS:
        raise HeaderError(f"{channels} channels; 1 to {_MAX_CHANNELS} are allowed")
    if not len(start):
        raise HeaderError("the sound has no samples")
    facts: dict[str, int | float] = {"sample_rate": rate, "num_channels": channels}
    if 0 < frames < _UNKNOWN_FRAMES:
        facts["duration_s"] = round(frames / rate, 6)
    return Header(suffix, facts)


def _video(data: bytes, suffix: str, demuxer: str) -> Header:
    import av

    try:
        with av.open(io.BytesIO(data), format=demuxer, io_open=_no_other_file) as container:
            facts = _video_facts(container)
    except HeaderError:
        raise
    except Exception as error:
        raise HeaderError(f"the video cannot be decoded: {error}") from None
    return Header(suffix, facts)


def _no_other_file(url: str, flags: int, options: Any) -> Any:
    raise HeaderError("the video wants to read another file")


def _video_facts(container: Any) -> dict[str, int | float]:
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not streams:
        raise HeaderError("the file has no video in it that could be decoded")
    stream = streams[0]
    facts: dict[str, int | float] = {
        "width": stream.codec_context.width,
        "height": stream.codec_context.height,
    }
    if not facts["width"] or not facts["height"]:
        raise HeaderError("the video has frames of no size")
    if container.duration and container.duration > 0:
        facts["duration_s"] = round(container.duration / 1_000_000, 6)
    if stream.average_rate:
        facts["fps"] = round(float(stream.average_rate), 6)
    if stream.frames:
        facts["num_frames"] = stream.frames
    sounds = [sound for sound in container.streams.audio if sound.codec_context is not None]
    if sounds:
        facts["sample_rate"] = sounds[0].codec_context.sample_rate
        facts["num_channels"] = sounds[0].codec_context.channels
    return facts

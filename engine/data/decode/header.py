"""What a medium says of itself, for whoever takes it in: its suffix, and its size, length, rates.

The kind is told by content. Pictures are decoded whole, since only that tells that they can be. Of
sound the header is read, of video all packets are listed: whether each sample or frame can be
decoded shows when it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from carillon.engine.data.decode.audio import audio_format, audio_header
from carillon.engine.data.decode.image import decode_rgb, picture_extension
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    AudioError,
    Deadline,
    DecodeError,
    ImageError,
    VideoError,
)
from carillon.engine.data.decode.video_track import opened_video, read_track, video_format


class MediumHeader(NamedTuple):
    """A medium's usual suffix and the facts that `meta.media` has of it."""

    suffix: str
    facts: dict[str, int | float]


def read_header(data: bytes) -> MediumHeader:
    """Raises DecodeError for what is no picture, sound or video that can be used."""
    if (suffix := _suffix(picture_extension, data)) is not None:
        width, height = decode_rgb(data).size
        return MediumHeader(suffix, {"width": width, "height": height})
    if (suffix := _suffix(audio_format, data)) is not None:
        return MediumHeader(suffix, _sound_facts(data))
    if (suffix := _suffix(video_format, data)) is not None:
        return MediumHeader(suffix, _video_facts(data))
    raise DecodeError(
        "not a JPEG, PNG, WebP, GIF or BMP picture, WAV, FLAC, OGG or MP3 sound, MP4 or WebM "
        f"video; it starts with {data[:8]!r}"
    )


def _suffix(tell: Any, data: bytes) -> str | None:
    try:
        return str(tell(data))
    except (ImageError, AudioError, VideoError):
        return None


def _sound_facts(data: bytes) -> dict[str, int | float]:
    header = audio_header(data)
    if header.num_frames == 0:
        raise AudioError("the sound has no samples")
    facts: dict[str, int | float] = {
        "sample_rate": header.rate,
        "num_channels": header.num_channels,
    }
    if header.num_frames is not None:
        facts["duration_s"] = round(header.num_frames / header.rate, 6)
    return facts


def _video_facts(data: bytes) -> dict[str, int | float]:
    deadline = Deadline(VideoError, "the video", DEFAULT_LIMITS)
    with opened_video(data, DEFAULT_LIMITS) as (container, stream):
        track = read_track(container, stream, DEFAULT_LIMITS, deadline)
        facts = {
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
            "duration_s": round(track.duration_s, 6),
            "fps": round(track.frame_rate, 6),
            "num_frames": int(track.shown.sum()),
        }
        for sound in container.streams.audio[:1]:
            if sound.codec_context is not None:
                facts["sample_rate"] = sound.codec_context.sample_rate
                facts["num_channels"] = sound.codec_context.channels
        return facts

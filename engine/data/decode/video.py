"""Frames from bytes, each with its time: MP4 and WebM with H.264 or VP9.

FFmpeg decodes, by PyAV. Frames are chosen by the times of all of them (video_track.py) before one
is decoded, and only runs of packets that begin at the last keyframe before a chosen frame are
decoded. Contexts of swscale that are kept from frame to frame convert and scale, several times as
fast as new ones. One thread a sample, for loaders have a process a core. What FFmpeg conceals of a
damaged frame is not seen. Left out: sound (audio.py), HDR tone mapping, interlaced fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from carillon.engine.data.decode.frame_choice import EveryFrame, Sampling
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    Deadline,
    Limits,
    VideoError,
    check_decoded_bytes,
)
from carillon.engine.data.decode.video_track import (
    Track,
    check_frame_size,
    opened_video,
    packet_stamp,
    read_track,
    runs,
)

# A triangle as wide as a reduction asks for, so a smaller frame does not alias.
_FILTER = Interpolation.BILINEAR | Interpolation.BITEXACT
_COLOURS = Interpolation.BICUBIC | Interpolation.BITEXACT

Size = int | tuple[int, int]


class Clip(NamedTuple):
    """Frames (T, H, W, 3) uint8 RGB with their times (T,) float64 in seconds of the file.

    `duration_s` and `frame_rate` are the whole video's, as counted from its frames.
    """

    frames: NDArray[np.uint8]
    times_s: NDArray[np.float64]
    duration_s: float
    frame_rate: float
    codec: str


def decode_video(
    data: bytes,
    sampling: Sampling | None = None,
    *,
    size: Size | None = None,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """Decode the frames that `sampling` chooses (none: all) in a window of the video.

    Shapes: `size` is (height, width), or the shorter side's length; none: as stored.
    Raises VideoError for another format or codec, damaged bytes, no video, no frames, a window
    without any, or more than `limits` allow; ValueError for a size or window that makes no sense.
    """
    check_video_request(size, start_s, duration_s)
    deadline = Deadline(VideoError, "the video", limits)
    with opened_video(data, limits) as (container, stream):
        track = read_track(container, stream, limits, deadline)
        chosen = track.choose(sampling or EveryFrame(), start_s, duration_s)
        frames = _frames(stream, track, chosen, size, limits, deadline)
        times_s = track.times_s[chosen]
        return Clip(frames, times_s, track.duration_s, track.frame_rate, stream.codec.name)


def check_video_request(size: Size | None, start_s: float, duration_s: float | None) -> None:
    """Raises ValueError, saying what was given and what is allowed."""
    sides = (size,) if isinstance(size, int) else size or ()
    if any(side < 1 for side in sides):
        raise ValueError(f"size: {size} given, sides of 1 or more are allowed")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s: {start_s} given, 0 or more is allowed")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s: {duration_s} given, more than 0 is allowed, or none: all")


def scaled_size(height: int, width: int, size: Size | None) -> tuple[int, int]:
    """(height, width) that a frame comes out with."""
    if isinstance(size, tuple):
        return size
    if size is None:
        return height, width
    scale = size / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _frames(
    stream: Any,
    track: Track,
    chosen: NDArray[np.int64],
    size: Size | None,
    limits: Limits,
    deadline: Deadline,
) -> NDArray[np.uint8]:
    """The chosen packets' frames, in the order of `chosen`."""
    wanted = {packet_stamp(track.packets[at]): place for place, at in enumerate(chosen.tolist())}
    missing = set(wanted)
    turned, out = _Upright(size), None
    for frame in _decoded_frames(stream, track, chosen, deadline):
        if frame.pts not in missing:
            continue
        check_frame_size(frame.width, frame.height, limits)
        if out is None:
            shape = (len(chosen), *turned.shape_of(frame), 3)
            check_decoded_bytes(VideoError, "the video", math.prod(shape), limits)
            out = np.empty(shape, np.uint8)
        out[wanted[frame.pts]] = turned(frame)
        missing.discard(frame.pts)
    if out is None or missing:
        raise VideoError(f"{len(missing):,} of {len(chosen):,} chosen frames cannot be decoded")
    return out


def _decoded_frames(
    stream: Any, track: Track, chosen: NDArray[np.int64], deadline: Deadline
) -> Iterator[Any]:
    """All frames of the runs of packets that the chosen ones need."""
    context = stream.codec_context
    for first, end in runs(track.keyframe, chosen):
        context.flush_buffers()
        for packet in track.packets[first:end]:
            yield from context.decode(packet)
            deadline.check()
        yield from context.decode(None)


class _Upright:
    """Frames to RGB of one size, turned as the first one says.

    Scales, then converts: swscale does both at once on chroma of full size, which takes twice as
    long. Its contexts are kept; a frame's own methods would make new ones.
    """

    def __init__(self, size: Size | None) -> None:
        self._size = size
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()
        self._turns = self._height = self._width = 0

    def shape_of(self, frame: Any) -> tuple[int, int]:
        """(height, width) of all frames that come out, by the first."""
        self._turns = round(frame.rotation / 90) % 4  # counterclockwise
        sideways = self._turns % 2 == 1
        height, width = frame.height, frame.width
        shown = scaled_size(*((width, height) if sideways else (height, width)), self._size)
        self._height, self._width = shown[::-1] if sideways else shown
        return shown

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        if frame.width != self._width or frame.height != self._height:
            frame = self._scaler.reformat(
                frame, self._width, self._height, interpolation=_FILTER, threads=1
            )
        rgb: Any = self._converter.reformat(
            frame, format="rgb24", interpolation=_COLOURS, threads=1
        )
        pixels: NDArray[np.uint8] = rgb.to_ndarray()
        return np.rot90(pixels, self._turns) if self._turns else pixels

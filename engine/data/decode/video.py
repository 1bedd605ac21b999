"""Frames from bytes, each with its time: MP4 and WebM with H.264 or VP9.

FFmpeg decodes, by PyAV. The container is told by content, and only its demuxer runs, without a way
to open another file. All packets are listed first, which costs little: so the times are those of
the frames and no header's, frames are chosen before one is decoded, and only runs of packets that
begin at the last keyframe before a wanted frame are decoded. Contexts of swscale that are kept from
frame to frame convert and scale, several times as fast as new ones. One thread a sample, for
loaders have a process a core. What FFmpeg conceals of a damaged frame is not seen. Left out: sound
(audio.py), HDR tone mapping, interlaced fields.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from carillon.engine.data.decode.frame_choice import EveryFrame, Sampling, chosen_frames
from carillon.engine.data.decode.limits import (
    DEFAULT_LIMITS,
    Deadline,
    Limits,
    VideoError,
    check_decoded_bytes,
)

CODECS = ("h264", "vp9")
_DEMUXERS = {"mp4": "mov", "webm": "matroska"}
# A triangle as wide as a reduction asks for, so a smaller frame does not alias.
_FILTER = Interpolation.BILINEAR | Interpolation.BITEXACT
_COLOURS = Interpolation.BICUBIC | Interpolation.BITEXACT


class Clip(NamedTuple):
    """Frames (T, H, W, 3) uint8 RGB with their times (T,) float64 in seconds of the file.

    `duration_s` and `frame_rate` are the whole video's, as counted from its frames.
    """

    frames: NDArray[np.uint8]
    times_s: NDArray[np.float64]
    duration_s: float
    frame_rate: float
    codec: str


class _Track(NamedTuple):
    """What a video holds, in presentation order where packets are not: times and keyframes."""

    packets: list[Any]
    times_s: NDArray[np.float64]
    end_s: float


def decode_video(
    data: bytes,
    sampling: Sampling | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """Decode the frames that `sampling` chooses (none: all) in a window of the video.

    Shapes: `size` is (height, width), or the shorter side's length; none: as stored.
    Raises VideoError for another format or codec, damaged bytes, no video, no frames, a window
    without any, or more than `limits` allow; ValueError for a size or window that makes no sense.
    """
    _check_request(size, start_s, duration_s)
    demuxer = _DEMUXERS[video_format(data)]
    try:
        with av.open(
            io.BytesIO(data), format=demuxer, buffer_size=1 << 18, io_open=_no_other_file
        ) as container:
            return _decoded(
                container, sampling or EveryFrame(), size, (start_s, duration_s), limits
            )
    except VideoError:
        raise
    # A decoder of hostile bytes may raise anything that its author did not foresee.
    except Exception as error:
        raise VideoError(f"the video cannot be decoded: {error}") from None


def video_format(data: bytes) -> str:
    """mp4 or webm, by content. Raises VideoError for other formats."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    raise VideoError(f"not an MP4 or WebM video; it starts with {data[:8]!r}")


def _check_request(
    size: int | tuple[int, int] | None, start_s: float, duration_s: float | None
) -> None:
    sides = (size,) if isinstance(size, int) else size or ()
    if any(side < 1 for side in sides):
        raise ValueError(f"size: {size} given, sides of 1 or more are allowed")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s: {start_s} given, 0 or more is allowed")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s: {duration_s} given, more than 0 is allowed, or none: all")


def _no_other_file(url: str, flags: int, options: Any) -> Any:
    raise VideoError("the video wants to read another file")


def _decoded(
    container: Any,
    sampling: Sampling,
    size: int | tuple[int, int] | None,
    window: tuple[float, float | None],
    limits: Limits,
) -> Clip:
    stream = _video_stream(container, limits)
    deadline = Deadline(VideoError, "the video", limits)
    track = _track(container, stream, limits, deadline)
    frame_rate = _frame_rate(track, limits)
    order = np.argsort(track.times_s, kind="stable")
    keyframe = np.array([packet.is_keyframe for packet in track.packets])
    chosen = order[chosen_frames(track.times_s[order], keyframe[order], sampling, *window)]
    if len(chosen) == 0:
        raise VideoError(
            f"no frame in the window from {window[0]:g} s; the video has {len(order):,} frames "
            f"from {track.times_s.min():.3f} to {track.times_s.max():.3f} s"
        )
    frames = _frames(stream, track, keyframe, chosen, size, limits, deadline)
    duration_s = track.end_s - float(track.times_s.min())
    return Clip(frames, track.times_s[chosen], duration_s, frame_rate, stream.codec.name)


def _video_stream(container: Any, limits: Limits) -> Any:
    streams = [s for s in container.streams.video if s.codec_context is not None]
    if not streams:
        raise VideoError("the file has no video in it that could be decoded")
    stream = streams[0]
    context = stream.codec_context
    if context.name not in CODECS:
        raise VideoError(f"the video is {context.name}; {' and '.join(CODECS)} are allowed")
    _check_frame_size(context.width, context.height, limits)
    context.thread_count = 1
    context.thread_type = "SLICE"
    context.options = {"max_pixels": str(limits.max_pixels)}
    return stream


def _check_frame_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise VideoError(
            f"the video has frames of {width} x {height} pixels; at most {limits.max_pixels:,} "
            "are allowed"
        )


def _track(container: Any, stream: Any, limits: Limits, deadline: Deadline) -> _Track:
    packets: list[Any] = []
    stamps: list[int] = []
    end = 0
    num_read = 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        num_read += 1
        if num_read > limits.max_frames:
            raise VideoError(f"the video has more than {limits.max_frames:,} frames")
        if packet.is_corrupt:
            raise VideoError(f"frame {num_read - 1:,} of the video is damaged or cut")
        if packet.is_discard:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:
            raise VideoError(f"frame {len(packets):,} of the video says no time")
        packets.append(packet)
        stamps.append(stamp)
        end = max(end, stamp + (packet.duration or 0))
        if num_read % 1024 == 0:
            deadline.check()
    if not packets:
        raise VideoError("the video has no frames")
    if num_read < stream.frames:
        raise VideoError(f"the video ends after {num_read:,} of {stream.frames:,} frames")
    base = float(stream.time_base)
    offset_s = (container.start_time or 0) / av.time_base
    return _Track(packets, np.array(stamps, np.float64) * base - offset_s, end * base - offset_s)


def _frame_rate(track: _Track, limits: Limits) -> float:
    """Frames a second, counted; 0 for a single frame. Raises VideoError above the limit."""
    span_s = float(np.ptp(track.times_s))
    intervals = len(track.packets) - 1
    if intervals == 0:
        return 0.0
    if intervals > span_s * limits.max_frame_rate:
        raise VideoError(
            f"the video has {intervals + 1:,} frames in {span_s:g} s; at most "
            f"{limits.max_frame_rate:g} a second are allowed"
        )
    return intervals / span_s


def _frames(
    stream: Any,
    track: _Track,
    keyframe: NDArray[np.bool_],
    chosen: NDArray[np.int64],
    size: int | tuple[int, int] | None,
    limits: Limits,
    deadline: Deadline,
) -> NDArray[np.uint8]:
    """The chosen packets' frames, in the order of `chosen`."""
    wanted = {_stamp(track.packets[index]): place for place, index in enumerate(chosen.tolist())}
    to_rgb, out, turns, height, width = _ToRgb(), None, 0, 0, 0
    missing = set(wanted)
    for frame in _decoded_frames(stream, track.packets, keyframe, chosen, deadline):
        if frame.pts not in missing:
            continue
        _check_frame_size(frame.width, frame.height, limits)
        if out is None:
            turns = round(frame.rotation / 90) % 4  # counterclockwise
            height, width = _stored_size(frame, size, turned=turns % 2 == 1)
            check_decoded_bytes(VideoError, "the video", len(chosen) * height * width * 3, limits)
            shown = (width, height) if turns % 2 else (height, width)
            out = np.empty((len(chosen), *shown, 3), np.uint8)
        pixels = to_rgb(frame, width, height)
        out[wanted[frame.pts]] = np.rot90(pixels, turns) if turns else pixels
        missing.discard(frame.pts)
    if out is None or missing:
        raise VideoError(f"{len(missing):,} of {len(wanted):,} chosen frames cannot be decoded")
    return out


class _ToRgb:
    """Scales, then converts: in two steps, for swscale does both at once on chroma of full size.

    Its contexts are kept from frame to frame; a frame's own methods would make new ones.
    """

    def __init__(self) -> None:
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any, width: int, height: int) -> NDArray[np.uint8]:
        scaled = self._scaler.reformat(frame, width, height, interpolation=_FILTER, threads=1)
        rgb: Any = self._converter.reformat(
            scaled, format="rgb24", interpolation=_COLOURS, threads=1
        )
        pixels: NDArray[np.uint8] = rgb.to_ndarray()
        return pixels


def _stored_size(
    frame: Any, size: int | tuple[int, int] | None, *, turned: bool
) -> tuple[int, int]:
    """(height, width) to scale to, before the frame is turned upright."""
    if isinstance(size, tuple):
        return (size[1], size[0]) if turned else size
    if size is None:
        return frame.height, frame.width
    scale = size / min(frame.height, frame.width)
    return max(1, round(frame.height * scale)), max(1, round(frame.width * scale))


def _stamp(packet: Any) -> int:
    return int(packet.pts if packet.pts is not None else packet.dts)


def _decoded_frames(
    stream: Any,
    packets: Sequence[Any],
    keyframe: NDArray[np.bool_],
    chosen: NDArray[np.int64],
    deadline: Deadline,
) -> Iterator[Any]:
    """All frames of the runs of packets that the chosen ones need."""
    context = stream.codec_context
    for first, last in runs(keyframe, chosen):
        context.flush_buffers()
        for packet in packets[first:last]:
            yield from context.decode(packet)
            deadline.check()
        yield from context.decode(None)


def runs(keyframe: NDArray[np.bool_], chosen: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[first, end) of packets in file order: from a keyframe through the last one chosen."""
    starts = np.flatnonzero(keyframe)
    if len(starts) == 0 or starts[0] != 0:
        starts = np.concatenate([[0], starts])
    groups = np.searchsorted(starts, np.sort(chosen), side="right") - 1
    ends = np.maximum.reduceat(np.sort(chosen), np.unique(groups, return_index=True)[1]) + 1
    merged: list[tuple[int, int]] = []
    for group, end in zip(np.unique(groups).tolist(), ends.tolist(), strict=True):
        first = int(starts[group])
        if merged and merged[-1][1] == first:
            first = merged.pop()[0]
        merged.append((first, end))
    return merged

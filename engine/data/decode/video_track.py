"""What a video holds, by its packets and not by its headers, before a frame is decoded.

The container is told by content, and only its demuxer runs, without a way to open another file.
Listing all packets costs little, and gives each frame's time and which ones are keyframes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from carillon.engine.data.decode.frame_choice import Sampling, chosen_frames
from carillon.engine.data.decode.limits import Deadline, Limits, VideoError

CODECS = ("h264", "vp9")
_DEMUXERS = {"mp4": "mov", "webm": "matroska"}
_BUFFER_BYTES = 2**18


class Track(NamedTuple):
    """Packets of the first video in a file, in the file's order, and what they say.

    `shown` is false for packets that are only there for others to be decoded (before a cut).
    `duration_s` and `frame_rate` are counted; the rate of a single frame is 0.
    """

    packets: list[Any]
    times_s: NDArray[np.float64]
    keyframe: NDArray[np.bool_]
    shown: NDArray[np.bool_]
    duration_s: float
    frame_rate: float

    def choose(
        self, sampling: Sampling, start_s: float, duration_s: float | None
    ) -> NDArray[np.int64]:
        """Places in `packets` of the chosen frames, by rising time.

        Raises VideoError where the window has no frame.
        """
        places = np.flatnonzero(self.shown)
        order = places[np.argsort(self.times_s[places], kind="stable")]
        times_s = self.times_s[order]
        chosen = chosen_frames(times_s, self.keyframe[order], sampling, start_s, duration_s)
        if len(chosen) == 0:
            raise VideoError(
                f"no frame in the window from {start_s:g} s; the video has {len(order):,} frames "
                f"from {times_s[0]:.3f} to {times_s[-1]:.3f} s"
            )
        return order[chosen]


def video_format(data: bytes) -> str:
    """mp4 or webm, by content. Raises VideoError for other formats."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    raise VideoError(f"not an MP4 or WebM video; it starts with {data[:8]!r}")


@contextmanager
def opened_video(data: bytes, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """(container, stream) of a file in memory. What goes wrong inside becomes a VideoError."""
    demuxer = _DEMUXERS[video_format(data)]
    try:
        with av.open(
            io.BytesIO(data), format=demuxer, buffer_size=_BUFFER_BYTES, io_open=_no_other_file
        ) as container:
            yield container, _video_stream(container, limits)
    except VideoError:
        raise
    # A decoder of hostile bytes may raise anything that its author did not foresee.
    except Exception as error:
        raise VideoError(f"the video cannot be decoded: {error}") from None


def read_track(container: Any, stream: Any, limits: Limits, deadline: Deadline) -> Track:
    """List the packets. Raises VideoError for none, too many, cut ones, or ones without times."""
    packets: list[Any] = []
    stamps: list[int] = []
    end = 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if len(packets) == limits.max_frames:
            raise VideoError(f"the video has more than {limits.max_frames:,} frames")
        if packet.is_corrupt:
            raise VideoError(f"frame {len(packets):,} of the video is damaged or cut")
        packets.append(packet)
        stamps.append(packet_stamp(packet))
        end = max(end, stamps[-1] + (packet.duration or 0))
        if len(packets) % 1024 == 0:
            deadline.check()
    if len(packets) < stream.frames:
        raise VideoError(f"the video ends after {len(packets):,} of {stream.frames:,} frames")
    shown = np.array([not packet.is_discard for packet in packets], bool)
    if not shown.any():
        raise VideoError("the video has no frames")
    base, offset_s = float(stream.time_base), (container.start_time or 0) / av.time_base
    times_s = np.array(stamps, np.float64) * base - offset_s
    keyframe = np.array([packet.is_keyframe for packet in packets])
    duration_s = end * base - offset_s - float(times_s[shown].min())
    rate = _frame_rate(times_s[shown], limits)
    return Track(packets, times_s, keyframe, shown, duration_s, rate)


def packet_stamp(packet: Any) -> int:
    """When a packet's frame is shown, in the stream's ticks; VideoError where it says nothing."""
    stamp = packet.pts if packet.pts is not None else packet.dts
    if stamp is None:
        raise VideoError("the video has a frame that says no time")
    return int(stamp)


def runs(keyframe: NDArray[np.bool_], chosen: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[first, end) of packets in file order: from a keyframe through the last one chosen."""
    starts = np.union1d([0], np.flatnonzero(keyframe))
    chosen = np.sort(chosen)
    groups, first_of_group = np.unique(
        np.searchsorted(starts, chosen, side="right") - 1, return_index=True
    )
    ends = np.maximum.reduceat(chosen, first_of_group) + 1
    merged: list[tuple[int, int]] = []
    for first, end in zip(starts[groups].tolist(), ends.tolist(), strict=True):
        if merged and merged[-1][1] == first:
            first = merged.pop()[0]
        merged.append((first, end))
    return merged


def check_frame_size(width: int, height: int, limits: Limits) -> None:
    """Raises VideoError above the limit of pixels."""
    if width * height > limits.max_pixels:
        raise VideoError(
            f"the video has frames of {width} x {height} pixels; at most {limits.max_pixels:,} "
            "are allowed"
        )


def _no_other_file(url: str, flags: int, options: Any) -> Any:
    raise VideoError("the video wants to read another file")


def _video_stream(container: Any, limits: Limits) -> Any:
    streams = [s for s in container.streams.video if s.codec_context is not None]
    if not streams:
        raise VideoError("the file has no video in it that could be decoded")
    stream = streams[0]
    context = stream.codec_context
    if context.name not in CODECS:
        raise VideoError(f"the video is {context.name}; {' and '.join(CODECS)} are allowed")
    check_frame_size(context.width, context.height, limits)
    context.thread_count = 1
    context.thread_type = "SLICE"
    context.options = {"max_pixels": str(limits.max_pixels)}
    return stream


def _frame_rate(times_s: NDArray[np.float64], limits: Limits) -> float:
    span_s, intervals = float(np.ptp(times_s)), len(times_s) - 1
    if intervals == 0:
        return 0.0
    if intervals > span_s * limits.max_frame_rate:
        raise VideoError(
            f"the video has {intervals + 1:,} frames in {span_s:g} s; at most "
            f"{limits.max_frame_rate:g} a second are allowed"
        )
    return intervals / span_s

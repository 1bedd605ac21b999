"""Small videos of known frames, written by PyAV for the tests of decoders."""

import io
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def frame(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Grey whose level says the index, with a red left upper quarter."""
    pixels = np.full((height, width, 3), 20 + 5 * (index % 40), np.uint8)
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    return pixels


@cache
def video(
    container: str = "mp4",
    *,
    codec: str | None = None,
    num_frames: int = 30,
    rate: int | Fraction = 10,
    keyframes_every: int = 10,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    path: Path | None = None,
) -> bytes:
    """A video of `frame(0)`, `frame(1)`, ... at the rate.

    Written by way of a `path`, an MP4 has its header in front.
    """
    buffer = io.BytesIO()
    options = {"movflags": "faststart"} if path else {}
    with av.open(str(path or "") or buffer, "w", format=container, options=options) as out:
        stream = out.add_stream(codec or {"mp4": "libx264", "webm": "libvpx-vp9"}[container], rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyframes_every
        stream.codec_context.thread_count = 1
        if container == "webm":
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"}
        else:
            stream.options = {"preset": "veryfast", "crf": "12", "x264-params": "scenecut=0"}
        for index in range(num_frames):
            picture = av.VideoFrame.from_ndarray(frame(index, *size), format="rgb24")
            for packet in stream.encode(picture):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return path.read_bytes() if path else buffer.getvalue()


def sound_only(container: str) -> bytes:
    """A file of the container with a second of sound and no video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream({"mp4": "aac", "webm": "libopus"}[container], 48_000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), "fltp", "mono")
        sound.sample_rate = 48_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000, 960)
        for part in [*resampler.resample(sound), *resampler.resample(None)]:
            for packet in stream.encode(part):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return buffer.getvalue()

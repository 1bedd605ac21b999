"""Encodes raw frames as H.264 in MP4 or VP9 in WebM by the installed ffmpeg program.

One thread and `bitexact`, so one version of the encoders gives the same bytes for the same frames.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from carillon.engine.config import UserError
from carillon.engine.data.sets.programs import find_program, run_program

_VP9 = ("-b:v", "0", "-crf", "28", "-deadline", "realtime", "-cpu-used", "6")
CODECS: Mapping[str, tuple[str, ...]] = {
    "mp4": ("-c:v", "libx264", "-preset", "fast", "-crf", "20", "-movflags", "+faststart"),
    "webm": ("-c:v", "libvpx-vp9", *_VP9),
}
CODEC_NAMES = {"mp4": "h264", "webm": "vp9"}
_TIMEOUT_S = 120


def check_encoders() -> str:
    """The version of ffmpeg. Raises UserError when it, or one of the encoders, is missing."""
    ffmpeg = find_program("ffmpeg", "ffmpeg")
    listed = run_program([ffmpeg, "-hide_banner", "-encoders"], timeout_s=_TIMEOUT_S).decode()
    for encoder in (options[1] for options in CODECS.values()):
        if not re.search(rf"\b{encoder}\b", listed):
            raise UserError(
                f"{ffmpeg} has no encoder {encoder}. Install Debian's: `apt-get install ffmpeg`"
            )
    version = run_program([ffmpeg, "-version"], timeout_s=_TIMEOUT_S).decode()
    return version.splitlines()[0]


def encode_clip(frames: bytes, suffix: str, *, width: int, height: int, fps: int) -> bytes:
    """Raw RGB frames as a video file of the suffix. Raises UserError when ffmpeg fails."""
    ffmpeg = find_program("ffmpeg", "ffmpeg")
    with tempfile.TemporaryDirectory() as folder:  # MP4 cannot be written to a pipe
        out = Path(folder) / f"clip.{suffix}"
        source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps))
        command: list[str | Path] = [
            *(ffmpeg, "-hide_banner", "-loglevel", "error", *source, "-i", "pipe:0"),
            *("-threads", "1", "-an", *CODECS[suffix], "-pix_fmt", "yuv420p"),
            *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1", out),
        ]
        run_program(command, stdin=frames, timeout_s=_TIMEOUT_S)
        return out.read_bytes()

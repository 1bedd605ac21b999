"""How much a decoder may be asked for, and the errors of bytes that it cannot use.

Headers say anything, so sizes are checked before memory is taken, and again against what comes out.
Input bytes are the caller's to limit: a shard's index knows them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


class DecodeError(ValueError):
    """The bytes cannot be used; the message says why."""


class ImageError(DecodeError):
    """The bytes are no picture that can be used."""


class AudioError(DecodeError):
    """The bytes are no sound that can be used."""


class VideoError(DecodeError):
    """The bytes are no video that can be used."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one sample may cost. The defaults fit films and podcasts, not an archive's masters."""

    max_pixels: int = 64_000_000  # of a picture or a frame; above the sensors of today's cameras
    max_decoded_bytes: int = 2**30  # of all samples or frames that are returned
    max_frames: int = 1_000_000  # in a video's file: four and a half hours at 60 a second
    max_frame_rate: float = 1000.0  # frames a second, as counted
    max_decode_s: float = 60.0  # of one sample; looked at between blocks and frames


DEFAULT_LIMITS = Limits()


class Deadline:
    """Ends a sample that takes longer than its limit."""

    def __init__(self, error: type[DecodeError], what: str, limits: Limits) -> None:
        self._error, self._what, self._limit_s = error, what, limits.max_decode_s
        self._end = time.monotonic() + limits.max_decode_s

    def check(self) -> None:
        """Raises DecodeError when the time is up."""
        if time.monotonic() > self._end:
            raise self._error(f"{self._what} took more than {self._limit_s:g} s to decode")


def check_decoded_bytes(
    error: type[DecodeError], what: str, size_bytes: int, limits: Limits
) -> None:
    """Raises `error`, saying what was asked for and how to ask for less."""
    if size_bytes > limits.max_decoded_bytes:
        raise error(
            f"{what} would take {size_bytes:,} bytes; at most {limits.max_decoded_bytes:,} are "
            "allowed: take a window of it, fewer frames or a smaller size"
        )

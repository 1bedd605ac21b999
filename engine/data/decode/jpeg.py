"""JPEGs by libjpeg-turbo, at 1/2, 1/4 or 1/8 of their size where the caller needs no more.

Scaling inside the inverse DCT decodes a quarter of the coefficients or fewer, and averages what it
leaves out, so nothing aliases. The other fractions that the library has are slower than the whole.
Its reader is strict: what it finds fault with, and CMYK, is None here and left to Pillow's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import simplejpeg

from carillon.engine.data.decode.limits import ImageError

_COLOURS = ("YCbCr", "Gray", "RGB")
_SCALES = (8, 4, 2)
_MAX_SCANNED_PIXELS = 1_000_000_000  # a progressive file may ask for each pixel in many scans
_MIN_SCAN_BYTES = 10  # a scan's header alone
_FREE_SCANS = 16  # a usual progressive file has about ten
_START_OF_SCAN = b"\xff\xda"
_EXIF = b"Exif\0\0"
_APP1 = 0xE1


def decode_jpeg(
    data: bytes, *, max_pixels: int, min_side: int | None
) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """Decode to (H, W, 3) RGB as stored, not turned; None where Pillow has to.

    Raises ImageError for more than `max_pixels`, or scans without end.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(width, height, max_pixels)
    check_scans(data, width * height)
    if colours not in _COLOURS:
        return None
    divisor = _divisor(min(width, height), min_side)
    try:
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = simplejpeg.decode_jpeg(
            data,
            min_height=-(-height // divisor),
            min_width=-(-width // divisor),
        )
    except ValueError:
        return None
    return pixels


def is_plain_jpeg(data: bytes, *, max_pixels: int) -> bool:
    """Whether this is a JPEG in colours or grey. Raises ImageError as decode_jpeg does."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    check_size(width, height, max_pixels)
    check_scans(data, width * height)
    return colours in _COLOURS


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ImageError above `max_pixels`."""
    if width * height > max_pixels:
        raise ImageError(
            f"the picture has {width} x {height} pixels; at most {max_pixels:,} are allowed"
        )


def check_scans(data: bytes, num_pixels: int) -> None:
    """Raises ImageError for a progressive file that asks for far more work than its pixels."""
    if num_pixels * (len(data) // _MIN_SCAN_BYTES) <= _MAX_SCANNED_PIXELS:
        return  # too short to hold so many: not worth a look at all of its bytes
    scans = data.count(_START_OF_SCAN)
    if scans > _FREE_SCANS and scans * num_pixels > _MAX_SCANNED_PIXELS:
        raise ImageError(f"the picture codes its {num_pixels:,} pixels in {scans} scans")


def exif_block(data: bytes) -> bytes | None:
    """The first EXIF block among the segments before the pixels; None where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _APP1 and data.startswith(_EXIF, at + 4):
            return data[at + 4 : at + 2 + size]
        if marker == _START_OF_SCAN[1] or size < 2:
            break
        at += 2 + size
    return None


def _divisor(side: int, min_side: int | None) -> int:
    if min_side is None:
        return 1
    return next((scale for scale in _SCALES if -(-side // scale) >= min_side), 1)

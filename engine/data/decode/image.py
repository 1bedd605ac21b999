"""Pictures from bytes to RGB pixels, for bytes that nobody vouches for.

The format is decided by content among five (JPEG, PNG, WebP, GIF, BMP) and only that decoder runs:
Pillow knows dozens more, each an attack surface. The size is read from the header and checked
before a pixel is decoded, so a decompression bomb costs nothing. Transparency is put on white,
16-bit grey keeps its upper byte, EXIF rotation is applied, of an animation the first frame counts.
JPEGs go through libjpeg-turbo (jpeg.py), and can be decoded at a fraction of their size, several
times faster, when the caller says how small the result may be. Left out: colour profiles (taken
as sRGB), SVG.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from carillon.engine.data.decode.jpeg import check_scans, check_size, decode_jpeg, exif_block
from carillon.engine.data.decode.limits import DEFAULT_LIMITS
from carillon.engine.data.decode.limits import ImageError as ImageError

MAX_PIXELS = DEFAULT_LIMITS.max_pixels

_JPEG = b"\xff\xd8\xff"
_ORIENTATION_TAG = 0x0112
_MAX_EXIF_ENTRIES = 512
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """Pillow's JPEG reader without its look for a resolution in EXIF, which costs and may warn."""

    def _read_dpi_from_exif(self) -> None:
        return


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode a picture to uint8 (H, W, 3) RGB; the array is the caller's to write.

    With `min_side`, a JPEG may come back at 1/2, 1/4 or 1/8 of its size, as long as neither side
    gets shorter than that. Raises ImageError as `decode_rgb` does.
    """
    if data.startswith(_JPEG):
        stored = decode_jpeg(data, max_pixels=max_pixels, min_side=min_side)
        if stored is not None:
            return _turned(stored, exif_block(data))
    image = decode_rgb(data, max_pixels=max_pixels, min_side=min_side)
    return np.array(image, dtype=np.uint8)


def decode_rgb(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> Image.Image:
    """Decode to a Pillow picture of mode RGB, upright and opaque.

    Raises ImageError for another format, damaged or truncated bytes, or more than `max_pixels`.
    """
    opener = _opener(data)
    try:
        image = opener(io.BytesIO(data))
    # Decoders of hostile bytes raise nearly anything (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        is_short = isinstance(error.__cause__ or error, struct.error)  # Pillow wraps some
        reason = "is cut short" if is_short else f"cannot be read: {error}"
        raise ImageError(f"the picture's header {reason}") from None
    check_size(image.width, image.height, max_pixels)
    if opener is _Jpeg:
        check_scans(data, image.width * image.height)
    try:
        if min_side is not None:
            image.draft("RGB", (min_side, min_side))
        image.load()
        return _upright(_opaque_rgb(image), image)
    except Exception as error:
        raise ImageError(f"the picture cannot be decoded: {error}") from None


def picture_extension(data: bytes) -> str:
    """The usual file extension of a picture, by content. Raises ImageError for other formats."""
    return _FORMATS[_opener(data)]


def _opener(data: bytes) -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    if data.startswith(_JPEG):
        return _Jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    raise ImageError(f"not a JPEG, PNG, WebP, GIF or BMP picture; it starts with {data[:8]!r}")


_FORMATS: dict[Any, str] = {
    _Jpeg: "jpg",
    PngImagePlugin.PngImageFile: "png",
    WebPImagePlugin.WebPImageFile: "webp",
    GifImagePlugin.GifImageFile: "gif",
    BmpImagePlugin.BmpImageFile: "bmp",
}


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip, not scale
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _turned(
    stored: np.ndarray[Any, np.dtype[np.uint8]], exif: bytes | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """As `_upright`, for pixels; contiguous."""
    orientation = _orientation(exif) if exif is not None else 1
    if orientation not in _TRANSPOSITIONS:
        return stored
    if orientation >= 5:
        stored = stored.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(stored[::rows, ::columns])


def _upright(rgb: Image.Image, opened: Image.Image) -> Image.Image:
    exif = opened.info.get("exif")
    if not isinstance(exif, bytes):
        return rgb
    transposition = _TRANSPOSITIONS.get(_orientation(exif))
    return rgb if transposition is None else rgb.transpose(transposition)


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 (upright) where it is absent or damaged.

    Pillow's own reader warns on a damaged block, which must not cost the picture.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(min(num_entries, _MAX_EXIF_ENTRIES)):
            at = start + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION_TAG:
                return int(value)
    except struct.error:
        pass
    return 1

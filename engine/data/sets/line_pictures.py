"""Draws lines of text as a picture, varied by a seed, and says exactly where each line is.

Letters are shaped by HarfBuzz through Pillow's Raqm, so Arabic joins and Hindi reorders. Lines are
drawn once as a mask, the mask is turned by a small angle, and colours, noise and JPEG come after:
so a line's polygon is its rectangle turned by the same angle, and its box the polygon's bounds.
Left out: perspective, curved lines, handwriting.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, features

from carillon.engine.config import UserError

_Pixels = np.ndarray[Any, np.dtype[np.float32]]
_Rectangle = tuple[float, float, float, float]
_MAX_TURN_DEGREES = 3.0
_MIN_CONTRAST = 110  # of 255, between ink and paper, so that every line can be read


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a picture looks like, apart from its words."""

    font_size: int
    margin: int
    line_gap: float
    turn_degrees: float
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    paper_end: tuple[int, int, int]
    noise: float
    blur: float
    jpeg_quality: int
    noise_seed: int


@dataclass(frozen=True, kw_only=True)
class LinePicture:
    """A JPEG, its size, and a polygon for each line (clockwise from the line's upper left)."""

    jpeg: bytes
    width: int
    height: int
    polygons: tuple[tuple[tuple[float, float], ...], ...]


def check_shaping() -> dict[str, str]:
    """The versions of what draws text. Raises UserError where letters would not be shaped."""
    if not features.check("raqm") or not features.check("fribidi"):
        raise UserError(
            "Pillow cannot shape text here: Raqm or FriBiDi is missing. Install Pillow's wheel "
            "(`pip install --only-binary :all: pillow`) and `apt-get install libfribidi0`"
        )
    names = ("raqm", "harfbuzz", "freetype2")
    return {"pillow": features.version("pil") or "?"} | {
        name: features.version(name) or "?" for name in names
    }


def draw_style(draws: random.Random) -> Style:
    """A style by chance: dark on light or light on dark, never too little contrast."""
    paper = _colour(draws, 150, 255)
    ink = _colour(draws, 0, 90)
    while _brightness(paper) - _brightness(ink) < _MIN_CONTRAST:
        ink = _colour(draws, 0, 90)
    if draws.random() < 0.25:
        ink, paper = paper, ink
    shift = draws.randint(-20, 20)
    end = tuple(min(255, max(0, level + shift)) for level in paper)
    return Style(
        font_size=draws.randint(18, 56),
        margin=draws.randint(6, 28),
        line_gap=draws.uniform(0.15, 0.6),
        turn_degrees=draws.uniform(-_MAX_TURN_DEGREES, _MAX_TURN_DEGREES),
        ink=ink,
        paper=paper,
        paper_end=(end[0], end[1], end[2]),
        noise=draws.choice((0.0, draws.uniform(2, 14))),
        blur=draws.choice((0.0, draws.uniform(0.2, 0.8))),
        jpeg_quality=draws.randint(55, 95),
        noise_seed=draws.getrandbits(32),
    )


def draw_lines(
    lines: Sequence[str],
    font_file: bytes,
    style: Style,
    *,
    face_index: int = 0,
    language: str | None = None,
    right_to_left: bool = False,
) -> LinePicture:
    """Draw lines below each other, those of right-to-left scripts flush right."""
    font = ImageFont.truetype(
        io.BytesIO(font_file),
        style.font_size,
        index=face_index,
        layout_engine=ImageFont.Layout.RAQM,
    )
    direction = "rtl" if right_to_left else "ltr"
    extents = [font.getbbox(line, direction=direction, language=language) for line in lines]
    widths = [box[2] - box[0] for box in extents]
    gap = round(style.line_gap * style.font_size)
    text_height = sum(box[3] - box[1] for box in extents) + gap * (len(lines) - 1)
    # Turning moves the ends of a line up and down: room for that is left around the text.
    slant = math.sin(math.radians(abs(style.turn_degrees)))
    left = style.margin + math.ceil(slant * text_height / 2)
    top = style.margin + math.ceil(slant * max(widths) / 2)
    size = (math.ceil(max(widths)) + 2 * left, math.ceil(text_height) + 2 * top)
    mask = Image.new("L", size)
    rectangles: list[_Rectangle] = []
    y = float(top)
    for line, box, width in zip(lines, extents, widths, strict=True):
        x = size[0] - left - width if right_to_left else left
        layer = Image.new("L", size)
        place = (x - box[0], y - box[1])
        ImageDraw.Draw(layer).text(
            place, line, fill=255, font=font, direction=direction, language=language
        )
        rectangles.append(layer.getbbox() or (x, y, x, y))  # its ink: an extent has bearings, too
        mask = ImageChops.lighter(mask, layer)
        y += box[3] - box[1] + gap
    turned = mask.rotate(style.turn_degrees, Image.Resampling.BICUBIC)
    return LinePicture(
        jpeg=_print(turned, style),
        width=size[0],
        height=size[1],
        polygons=tuple(_turn(rectangle, style.turn_degrees, size) for rectangle in rectangles),
    )


def _print(mask: Image.Image, style: Style) -> bytes:
    """Ink on paper, with noise, as JPEG."""
    if style.blur:
        mask = mask.filter(ImageFilter.GaussianBlur(style.blur))
    share: _Pixels = np.asarray(mask, np.float32)[..., None] / np.float32(255)
    along = np.linspace(0, 1, mask.width, dtype=np.float32)[None, :, None]
    start, end, ink = (np.array(c, np.float32) for c in (style.paper, style.paper_end, style.ink))
    paper: _Pixels = start + (end - start) * along
    pixels: _Pixels = paper + (ink - paper) * share
    if style.noise:
        generator = np.random.default_rng(style.noise_seed)
        noise = generator.standard_normal(pixels.shape[:2], dtype=np.float32)
        pixels += np.float32(style.noise) * noise[..., None]
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=style.jpeg_quality)
    return buffer.getvalue()


def _turn(
    rectangle: _Rectangle, degrees: float, size: tuple[int, int]
) -> tuple[tuple[float, float], ...]:
    """The corners of a rectangle after Pillow's rotate, which turns around the picture's middle."""
    centre_x, centre_y = size[0] / 2, size[1] / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    left, top, right, bottom = rectangle
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return tuple(
        (
            round(centre_x + (x - centre_x) * cosine + (y - centre_y) * sine, 1),
            round(centre_y - (x - centre_x) * sine + (y - centre_y) * cosine, 1),
        )
        for x, y in corners
    )


def _colour(draws: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return draws.randint(low, high), draws.randint(low, high), draws.randint(low, high)


def _brightness(colour: tuple[int, int, int]) -> float:
    """Luma of ITU-R BT.601."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]

"""Draws what retrieval found: a query beside its pictures, the right ones framed in green.

The page is an SVG with the pictures embedded, rendered by resvg, which shapes every script and
orders right-to-left text; matplotlib does neither. Only fonts that the texts need are loaded, so a
page looks the same on machines that have them. Right ones also carry a tick, for readers who do not
see green. Left out: interaction and links (the SVG is not kept).
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from carillon.engine.data.publish import publish_file
from carillon.engine.eval.fonts import FAMILY, choose_fonts
from carillon.engine.eval.text_layout import directed, lines_of, shown

TILE = 132
GAP = 16
LEFT = 290
TITLE_HEIGHT = 64
TILE_HEIGHT = TILE + 46


class Found(NamedTuple):
    """One picture found: uint8 (H, W, 3), score, caption, right or not (None: unknown)."""

    image: np.ndarray
    score: float
    caption: str
    is_right: bool | None


class Row(NamedTuple):
    """A query, text or uint8 (H, W, 3), with what it found, best first; `label` stands above it."""

    query: str | np.ndarray
    found: Sequence[Found]
    label: str = ""


def picture_grid(
    path: str | Path,
    rows: Sequence[Row],
    title: str,
    *,
    columns: int = 5,
    font_folders: Sequence[str | Path] = (),
) -> Path:
    """Write a PNG with one band per query: the query at the left, its pictures beside it.

    A query with more pictures than columns takes several lines.
    Raises: ValueError when there is no row or columns is below 1, UserError when the file cannot be
    written.
    """
    if not rows or columns < 1:
        raise ValueError(f"a picture grid needs rows and columns, got {len(rows)} and {columns}")
    top, parts, texts = TITLE_HEIGHT, [_text(GAP, 40, 22, title)], [title]
    for row in rows:
        height = max(1, -(-len(row.found) // columns)) * TILE_HEIGHT + GAP
        parts.append(_band(row, top, columns))
        texts += [row.label, *([row.query] if isinstance(row.query, str) else [])]
        texts += [found.caption for found in row.found]
        top += height
    width = LEFT + columns * (TILE + GAP) + GAP
    png = render_svg("".join(parts), width, top + GAP, choose_fonts(texts, font_folders).files)
    publish_file(Path(path), png, parents=True)
    return Path(path)


def render_svg(body: str, width: int, height: int, font_files: Sequence[str]) -> bytes:
    """The PNG of an SVG's body on white, drawn with these fonts alone."""
    from resvg_py import svg_to_bytes

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>'
    )
    return bytes(
        svg_to_bytes(
            svg_string=svg,
            skip_system_fonts=True,
            font_files=list(font_files),
            sans_serif_family=FAMILY,
        )
    )


def _band(row: Row, top: int, columns: int) -> str:
    line = f'<rect x="{GAP}" y="{top - GAP // 2}" width="100%" height="1" fill="#e4e4e7"/>'
    parts = [line, _text(GAP, top + 18, 12, row.label, fill="#71717a")]
    if isinstance(row.query, str):
        for i, text in enumerate(lines_of(shown(row.query), (LEFT - 2 * GAP - 12) / 17, 5)):
            parts.append(_text(GAP, top + 44 + 24 * i, 17, text))
    else:
        parts.append(_image(row.query, GAP, top + 26))
    for i, found in enumerate(row.found):
        x = LEFT + i % columns * (TILE + GAP)
        parts.append(_tile(found, x, top + 8 + i // columns * TILE_HEIGHT))
    return "".join(parts)


def _tile(found: Found, x: int, y: int) -> str:
    parts = [_image(found.image, x, y)]
    if found.is_right:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{TILE}" height="{TILE}" rx="6" fill="none" '
            f'stroke="#16a34a" stroke-width="5"/><circle cx="{x + TILE - 13}" cy="{y + 13}" r="11" '
            f'fill="#16a34a"/><path d="M{x + TILE - 18} {y + 13}l4 4l7 -8" fill="none" '
            'stroke="#ffffff" stroke-width="2.5"/>'
        )
    parts.append(_text(x, y + TILE + 15, 12, f"{found.score:.3f}", fill="#18181b"))
    caption = lines_of(shown(found.caption), TILE / 11, 1)[0]
    parts.append(_text(x, y + TILE + 30, 11, caption, fill="#52525b"))
    return "".join(parts)


def _image(image: np.ndarray, x: int, y: int) -> str:
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    picture = Image.fromarray(image)
    picture.thumbnail((2 * TILE, 2 * TILE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<rect x="{x}" y="{y}" width="{TILE}" height="{TILE}" rx="6" fill="#f4f4f5"/>'
        f'<image x="{x + 4}" y="{y + 4}" width="{TILE - 8}" height="{TILE - 8}" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _text(x: int, y: int, size: int, text: str, *, fill: str = "#18181b") -> str:
    style = f'font-family="{FAMILY}" font-size="{size}" fill="{fill}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(directed(shown(text)))}</text>'

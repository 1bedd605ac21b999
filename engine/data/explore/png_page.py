"""Samples as one PNG: cards in columns, each with its media and the first of its texts.

Laid out as an SVG and rendered by resvg, as the pages of eval/picture.py are: every script is
shaped, with the fonts that this machine has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from carillon.engine.data.explore.cards import Card, Said
from carillon.engine.data.explore.html_page import data_url
from carillon.engine.data.explore.panels import Panel
from carillon.engine.eval.fonts import FAMILY, choose_fonts
from carillon.engine.eval.picture import render_svg
from carillon.engine.eval.text_layout import directed, lines_of, shown

CARD_WIDTH, GAP, TITLE_HEIGHT = 320, 20, 76
MAX_PANEL_HEIGHT = 240
MAX_TEXTS, LINES_A_TEXT = 5, 2
_INK, _FAINT, _ERROR = "#18181b", "#71717a", "#dc2626"


class _Drawn(NamedTuple):
    """Part of a card: SVG that is drawn from its own (0, 0), and its height."""

    svg: str
    height: int


class PngPage(NamedTuple):
    """The page, and the characters of its texts for which this machine has no font."""

    png: bytes
    missing: frozenset[str]


def png_page(title: str, about: str, cards: Sequence[Card], *, columns: int) -> PngPage:
    """The page as PNG; each card goes to the column that is the shortest so far."""
    columns = min(columns, len(cards))
    width = columns * (CARD_WIDTH + GAP) + GAP
    heights = [TITLE_HEIGHT] * columns
    parts = [
        _line(GAP, 36, 22, title, _INK, width - 2 * GAP),
        _line(GAP, 58, 12, about, _FAINT, width - 2 * GAP),
    ]
    for card in cards:
        column = heights.index(min(heights))
        drawn = _card(card)
        x = GAP + column * (CARD_WIDTH + GAP)
        parts.append(f'<g transform="translate({x} {heights[column]})">{drawn.svg}</g>')
        heights[column] += drawn.height + GAP
    fonts = choose_fonts([title, about, *_all_texts(cards)])
    png = render_svg("".join(parts), width, max(heights), fonts.files)
    return PngPage(png, fonts.missing)


def _card(card: Card) -> _Drawn:
    height, svg = 24, [_line(0, 14, 12, f"{card.key}  ({card.split})", _INK, CARD_WIDTH)]
    for part in _parts(card):
        svg.append(f'<g transform="translate(0 {height})">{part.svg}</g>')
        height += part.height
    svg.append(f'<rect y="{height}" width="{CARD_WIDTH}" height="1" fill="#e4e4e7"/>')
    return _Drawn("".join(svg), height + 1)


def _parts(card: Card) -> Iterator[_Drawn]:
    if card.error is not None:
        yield _lines(card.error, 11, _ERROR, 4)
    for panel in card.panels:
        yield _panel(panel)
    for one in _first(card.texts):
        yield _lines(f"{one.language}: {one.text}", 12, _INK, LINES_A_TEXT)
    if len(card.texts) > MAX_TEXTS:
        yield _lines(f"and {len(card.texts) - MAX_TEXTS:,} more texts", 11, _FAINT, 1)
    licence = dict(card.fields).get("licence")
    if licence:
        yield _lines(licence, 11, _FAINT, 1)
    yield _Drawn("", 6)


def _first(texts: Sequence[Said]) -> Sequence[Said]:
    """A text of each language before the second of any."""
    place: dict[str, int] = {}
    ranked = []
    for number, one in enumerate(texts):
        place[one.language] = place.get(one.language, 0) + 1
        ranked.append((place[one.language], number))
    return [texts[number] for _, number in sorted(ranked)[:MAX_TEXTS]]


def _panel(panel: Panel) -> _Drawn:
    if panel.pixels is None:
        return _lines(panel.note, 11, _ERROR, 4)
    height, width, _ = panel.pixels.shape
    scale = min(CARD_WIDTH / width, MAX_PANEL_HEIGHT / height, 2)
    width, height = round(width * scale), max(1, round(height * scale))
    picture = (
        f'<image x="{(CARD_WIDTH - width) // 2}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{data_url(panel.pixels)}"/>'
    )
    note = _lines(panel.note, 10, _FAINT, 2)
    svg = f'{picture}<g transform="translate(0 {height})">{note.svg}</g>'
    return _Drawn(svg, height + note.height)


def _lines(text: str, size: int, fill: str, max_lines: int) -> _Drawn:
    step = size + 5
    lines = lines_of(shown(text), CARD_WIDTH / size, max_lines)
    svg = [_line(0, size + 2 + step * i, size, line, fill) for i, line in enumerate(lines)]
    return _Drawn("".join(svg), step * len(lines) + 2)


def _line(x: int, y: int, size: int, text: str, fill: str, max_width: int | None = None) -> str:
    if max_width is not None:
        text = lines_of(shown(text), max_width / size, 1)[0]
    style = f'font-family="{FAMILY}" font-size="{size}" fill="{fill}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(directed(shown(text)))}</text>'


def _all_texts(cards: Sequence[Card]) -> Iterator[str]:
    for card in cards:
        yield card.key
        yield from (one.text for one in _first(card.texts))
        yield from (value for _, value in card.fields)

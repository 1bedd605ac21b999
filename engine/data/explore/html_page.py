"""Samples as one HTML file that needs nothing else.

Every text is escaped and freed of overrides of direction, and stands in an element of its own whose
direction follows from the text. Pictures are part of the file. A policy in the page forbids scripts
and anything from elsewhere, should an escape ever be missed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from carillon.engine.data.explore.cards import Card
from carillon.engine.data.explore.panels import Panel, Pixels
from carillon.engine.eval.text_layout import shown

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #71717a; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1500px;
  padding: 0 16px; }
h1 { font-size: 22px; margin: 0 0 4px; }
header p { margin: 0 0 20px; color: var(--faint); overflow-wrap: anywhere; }
main { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
article { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
article h2 { font: 600 13px ui-monospace, monospace; margin: 0 0 8px; overflow-wrap: anywhere; }
article h2 small { color: var(--faint); font-weight: 400; }
figure { margin: 0 0 10px; }
figure img { display: block; max-width: 100%; max-height: 320px; margin: auto;
  border-radius: 6px; }
figure.audio img { width: 100%; }
figcaption, dl { color: var(--faint); font-size: 12px; overflow-wrap: anywhere; }
.texts { max-height: 260px; overflow: auto; }
.texts p { margin: 0 0 4px; display: flex; gap: 8px; }
.texts p > bdi { overflow-wrap: anywhere; min-width: 0; flex: 1; }
.texts code { color: var(--faint); flex: 0 0 auto; }
.transcripts > bdi, .segments > bdi { font-style: italic; }
.error { color: #dc2626; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 8px; margin: 8px 0 0; }
dd { margin: 0; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, about: str, cards: Iterable[Card]) -> bytes:
    """The whole page."""
    body = "\n".join(map(_article, cards))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><header>"
        f"<h1>{_text(title)}</h1><p>{_text(about)}</p></header>\n<main>\n{body}\n</main></body>"
        "</html>\n"
    )
    return page.encode("utf-8", "replace")


def _article(card: Card) -> str:
    where = f"{_text(card.split)}, row {card.row:,}"
    parts = [f"<h2><bdi>{_text(card.key)}</bdi> <small>{where}</small></h2>"]
    if card.error is not None:
        parts.append(f'<p class="error">{_text(card.error)}</p>')
    parts += map(_figure, card.panels)
    if card.texts:
        parts.append('<div class="texts">')
        for one in card.texts:
            language = _text(one.language)
            parts.append(
                f'<p class="{one.kind}"><code>{language}</code>'
                f'<bdi lang="{language}">{_text(one.text)}</bdi></p>'
            )
        parts.append("</div>")
    if card.fields:
        rows = (f"<dt>{name}</dt><dd><bdi>{_text(value)}</bdi></dd>" for name, value in card.fields)
        parts.append(f"<dl>{''.join(rows)}</dl>")
    return f"<article>{''.join(parts)}</article>"


def _figure(panel: Panel) -> str:
    if panel.pixels is None:
        return f'<p class="error">{_text(panel.note)}</p>'
    return (
        f'<figure class="{panel.modality}"><img alt="" src="{data_url(panel.pixels)}">'
        f"<figcaption>{_text(panel.note)}</figcaption></figure>"
    )


def data_url(pixels: Pixels) -> str:
    """A picture as a URL that holds it: PNG where that is smaller, else JPEG."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.save(buffer, kind.upper(), **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _text(text: str) -> str:
    return escape(shown(text))

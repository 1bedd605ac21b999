"""Histograms and bars of the report, as SVG in the page itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _BOTTOM, _TOP = 520, 150, 22, 16
_NUM_BINS = 48


def histogram(values: Any, limits: Sequence[float], label: str) -> str:
    """Values as bars, with a line at each limit; the outermost 0.2% are put at the edges."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return f"<p>No {escape(label)} was measured.</p>"
    low, high = np.quantile(values, [0.001, 0.999])
    low, high = min(low, *limits, low), max(high, *limits, high)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(values, low, high), bins=_NUM_BINS, range=(low, high))
    parts = [_bar(at, count / max(1, counts.max())) for at, count in enumerate(counts) if count]
    parts += [_limit(limit, (limit - low) / (high - low)) for limit in limits]
    parts += [
        _text(0, _HEIGHT - 6, f"{low:.4g}", "start"),
        _text(_WIDTH / 2, _HEIGHT - 6, f"{label} of {len(values):,} items", "middle"),
        _text(_WIDTH, _HEIGHT - 6, f"{high:.4g}", "end"),
        _text(0, 11, f"{counts.max():,} at most in a bar", "start"),
    ]
    title = f"<title>{escape(label)}: {len(values):,} values</title>"
    return (
        f'<svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{title}'
        f"{''.join(parts)}</svg>"
    )


def share_bar(share: float) -> str:
    """A bar of a share between 0 and 1."""
    return f'<span class="bar"><span style="width:{100 * min(1.0, share):.1f}%"></span></span>'


def _bar(at: int, share: float) -> str:
    width = _WIDTH / _NUM_BINS
    height = max(1.0, share * (_HEIGHT - _BOTTOM - _TOP))
    return (
        f'<rect x="{at * width:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
        f'width="{width - 1:.1f}" height="{height:.1f}"/>'
    )


def _limit(limit: float, share: float) -> str:
    x = share * _WIDTH
    anchor, shift = ("end", -4) if share > 0.85 else ("start", 4)
    return (
        f'<line class="limit" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}"/>'
        + _text(x + shift, _TOP + 10, f"limit {limit:g}", anchor)
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

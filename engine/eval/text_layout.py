"""Prepares a text for a page or a terminal: what may be shown, where lines break, its direction.

Widths are estimated, not measured, so a line may end a little early; shaping and the order of
characters within a line are the renderer's. Left out: hyphenation and dictionary word breaks (Thai
breaks between clusters).
"""

import re
import unicodedata
from collections.abc import Iterator

MAX_SHOWN = 2000
# A mark, or a mark of punctuation, stays with what it follows.
_CLINGING = ("Mn", "Mc", "Me", "Cf", "Po", "Pe", "Pf")


def shown(text: str) -> str:
    """The text without what must not reach a page or a terminal: controls, surrogates, overrides.

    Bidirectional overrides go too: a caption must not reorder what stands around it.
    """
    kept = (
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c
        for c in text[:MAX_SHOWN]
        if unicodedata.category(c) not in ("Cs", "Cn", "Co")
        and not ("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069")
    )
    return " ".join("".join(kept).split())


def directed(text: str) -> str:
    """Embed a text that begins right-to-left, so that its punctuation ends up at its left end."""
    strong = (unicodedata.bidirectional(c) for c in text)
    first = next((d for d in strong if d in ("L", "R", "AL")), "L")
    return f"\u202b{text}\u202c" if first != "L" else text


def lines_of(text: str, width_em: float, max_lines: int) -> list[str]:
    """Break a text into lines of about `width_em` font sizes, the last one cut with an ellipsis.

    Words stay whole where there are spaces; scripts without them break between clusters.
    """
    lines, line = [], ""
    for piece in _pieces(text, width_em):
        if line and _width(line + piece.rstrip()) > width_em:
            lines.append(line.strip())
            line = piece.lstrip()
        else:
            line += piece
    lines.append(line.strip())
    if len(lines) > max_lines:
        kept = lines[max_lines - 1]
        while _width(kept) > width_em - 1 and kept:
            kept = kept[:-1]
        lines = [*lines[: max_lines - 1], kept.rstrip() + "\u2026"]
    return lines


def _pieces(text: str, width_em: float) -> Iterator[str]:
    """Words with the space after them; a word wider than a line in clusters."""
    for word in re.findall(r"\S+\s*|\s+", text):
        if _width(word) <= width_em:
            yield word
        else:
            yield from _clusters(word)


def _clusters(word: str) -> Iterator[str]:
    cluster = ""
    for char in word:
        if cluster and unicodedata.category(char) not in _CLINGING and cluster[-1] != "\u200d":
            yield cluster
            cluster = ""
        cluster += char
    yield cluster


def _width(text: str) -> float:
    """A rough width in font sizes: DejaVu Sans averages 0.56, East Asian characters take 1."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    marks = sum(unicodedata.category(char) in ("Mn", "Cf") for char in text)
    return 0.56 * (len(text) - wide - marks) + wide

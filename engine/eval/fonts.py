"""Which fonts on this machine can draw a text.

Fonts are opened only until every character is covered, plain sans faces first, starting with the
DejaVu Sans that matplotlib carries; so a Latin page opens one file, however many are installed.
Left out: colour fonts, bold and italic faces, and downloading anything.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

FAMILY = "DejaVu Sans"
# Faces that would win a glyph but draw it wrongly: placeholders, slanted, bold, or in colour.
_UNSUITABLE = re.compile(
    r"lastresort|bold|ital|obliq|black|thin|light|heavy|color|emoji|symbol", re.I
)
_SUITABLE = re.compile(r"noto ?sans|sans", re.I)


class FontChoice(NamedTuple):
    """The files to load, the first one first in preference, and the characters none can draw."""

    files: tuple[str, ...]
    missing: frozenset[str]


def choose_fonts(texts: Iterable[str], folders: Sequence[str | Path] = ()) -> FontChoice:
    """Pick font files that together cover the texts, from `folders` and the system's."""
    left = {char for text in texts for char in text if _is_drawn(char)}
    files = [_base_font()]
    left = {char for char in left if not _covers(files[0], char)}
    for path in _candidates(tuple(str(folder) for folder in folders)):
        if not left:
            break
        found = {char for char in left if _covers(path, char)}
        if found:
            files.append(path)
            left -= found
    return FontChoice(tuple(files), frozenset(left))


def is_covered(text: str, folders: Sequence[str | Path] = ()) -> bool:
    """Whether every visible character of the text has a glyph somewhere."""
    return not choose_fonts([text], folders).missing


def _is_drawn(char: str) -> bool:
    """Whether a character needs a glyph: not spaces, joiners, controls or variation selectors."""
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zs") and not (
        "\ufe00" <= char <= "\ufe0f"
    )


@cache
def _base_font() -> str:
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _candidates(folders: tuple[str, ...]) -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    paths = {*findSystemFonts(list(folders) or None), *(findSystemFonts() if folders else ())}
    plain = (path for path in paths if not _UNSUITABLE.search(Path(path).stem))
    return tuple(sorted(plain, key=lambda p: (not _SUITABLE.search(Path(p).stem), len(p), p)))


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except RuntimeError:  # FreeType's word for a damaged or bitmap-only file
        return frozenset()


def _covers(path: str, char: str) -> bool:
    return ord(char) in _characters(path)

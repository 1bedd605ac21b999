"""Which fonts draw which language: faces of the Noto family in two Debian packages.

A face is chosen for a text only when it has a glyph for each of its characters: most script fonts
of the family have no Latin letters. Left out: slanted faces, and scripts that neither the names of
CLDR nor the fonts have.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from carillon.engine.config import UserError
from carillon.engine.data.sets.debian import DebianPackage

FONT_PACKAGES = ("fonts-noto-core", "fonts-noto-cjk")
FONT_LICENCE = "OFL-1.1"


@dataclass(frozen=True, kw_only=True)
class Script:
    """How a language is written: what its letters' Unicode names begin with, faces, direction."""

    name: str
    letters: tuple[str, ...]
    faces: tuple[str, ...]
    face_index: int = 0
    right_to_left: bool = False
    comma: str = ", "


@dataclass(frozen=True, kw_only=True)
class Face:
    """A face of a font file, and where in a package's tar the file stands."""

    file: str
    package: str
    tar: Path
    offset: int
    size: int
    index: int


@lru_cache(maxsize=8)
def font_bytes(face: Face) -> bytes:
    """The font file."""
    with face.tar.open("rb") as file:
        file.seek(face.offset)
        return file.read(face.size)


def faces_of(language: str, packages: Iterable[DebianPackage]) -> list[Face]:
    """The faces that the packages have for a language. Raises UserError when there is none."""
    script = SCRIPTS[language]
    files = {
        file.rpartition("/")[2]: (package, file) for package in packages for file in package.members
    }
    found = [files[name] for name in script.faces if name in files]
    if not found:
        raise UserError(
            f"{language} cannot be drawn: none of {', '.join(script.faces)} is in the packages "
            f"{' and '.join(FONT_PACKAGES)}"
        )
    return [
        Face(
            file=file,
            package=package.spec,
            tar=package.tar,
            offset=package.members[file].offset,
            size=package.members[file].size,
            index=script.face_index,
        )
        for package, file in found
    ]


def is_written_in(text: str, script: Script) -> bool:
    """Whether a text has letters, and all of them are of the script."""
    names = [name for name in map(_letter_name, text) if name]
    return bool(names) and all(name.startswith(script.letters) for name in names)


def characters_in(text: str) -> frozenset[int]:
    """The code points that need a glyph: all but spaces and joiners."""
    return frozenset(ord(c) for c in text if unicodedata.category(c) not in ("Cf", "Zs"))


@lru_cache(maxsize=256)
def characters_of(face: Face) -> frozenset[int]:
    """The code points that a face has glyphs for. Raises UserError for a damaged font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(io.BytesIO(font_bytes(face))).get_charmap())
    except RuntimeError as error:  # FreeType's word for a damaged file
        raise UserError(f"the font {face.file} of {face.package} is damaged: {error}") from None


@lru_cache(maxsize=65_536)
def _letter_name(char: str) -> str:
    """A letter's Unicode name; empty for what is no letter."""
    return unicodedata.name(char, "?") if unicodedata.category(char).startswith("L") else ""


def _weights(*stems: str, suffix: str = "ttf") -> tuple[str, ...]:
    return tuple(f"Noto{stem}-{weight}.{suffix}" for stem in stems for weight in _WEIGHTS)


def _noto(name: str, *, comma: str = ", ", right_to_left: bool = False) -> Script:
    return Script(
        name=name,
        letters=(name.upper(),),
        faces=_weights(f"Sans{name}", f"Serif{name}"),
        right_to_left=right_to_left,
        comma=comma,
    )


def _european(name: str) -> Script:
    return Script(name=name, letters=(name.upper(),), faces=_weights("Sans", "Serif"))


def _arabic(*faces: str) -> Script:
    letters = ("ARABIC",)
    return Script(name="Arabic", letters=letters, faces=faces, right_to_left=True, comma="، ")


def _cjk(name: str, *letters: str, face_index: int, comma: str = "、") -> Script:
    faces = _weights("SansCJK", "SerifCJK", suffix="ttc")
    return Script(name=name, letters=letters, faces=faces, face_index=face_index, comma=comma)


_WEIGHTS = ("Regular", "Bold")
_LATIN, _CYRILLIC, _GREEK = map(_european, ("Latin", "Cyrillic", "Greek"))
_NASKH = _arabic(*_weights("SansArabic", "NaskhArabic", "KufiArabic"))
_NASTALIQ = _arabic("NotoNastaliqUrdu-Regular.ttf", "NotoNaskhArabic-Regular.ttf")

# CLDR's code of a language -> how it is written. The faces of a CJK collection are its regions.
SCRIPTS: Mapping[str, Script] = {
    **dict.fromkeys(("en", "de", "fr", "es", "pl", "cs", "tr", "vi", "sw"), _LATIN),
    **dict.fromkeys(("ru", "uk"), _CYRILLIC),
    "el": _GREEK,
    **dict.fromkeys(("ar", "fa"), _NASKH),
    "ur": _NASTALIQ,
    "he": _noto("Hebrew", right_to_left=True),
    "hi": _noto("Devanagari"),
    "bn": _noto("Bengali"),
    "gu": _noto("Gujarati"),
    "pa": _noto("Gurmukhi"),
    "ta": _noto("Tamil"),
    "te": _noto("Telugu"),
    "kn": _noto("Kannada"),
    "ml": _noto("Malayalam"),
    "si": _noto("Sinhala"),
    "th": _noto("Thai", comma=" "),
    "lo": _noto("Lao", comma=" "),
    "km": _noto("Khmer", comma=" "),
    "my": _noto("Myanmar", comma=" "),
    "ka": _noto("Georgian"),
    "hy": _noto("Armenian"),
    "am": _noto("Ethiopic", comma="፣ "),
    "ja": _cjk("Japanese", "CJK", "HIRAGANA", "KATAKANA", face_index=0),
    "ko": _cjk("Hangul", "HANGUL", face_index=1, comma=", "),
    "zh": _cjk("Han", "CJK", face_index=2),
    "zh-Hant": _cjk("Han", "CJK", face_index=3),
}

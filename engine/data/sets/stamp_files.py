"""What the files of the stamps package say: which stamp, its names, who speaks which of its sounds.

A stamp X is X.png or X.svg with X.txt (its name in English, then LOCALE.utf8=name), and may have
X.ogg (its sound), X_LOCALE.ogg (that sound in a language: a digit spoken) and X_desc[_LOCALE].ogg
(its name, spoken). Locales become BCP 47 tags: sr@latin is sr-Latn. X_mirror.png and the like, how
a stamp looks turned over, are left out; so are sounds that belong to no stamp.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

PICTURES = ("png", "svg")
SOUNDS = ("ogg", "wav")

_NAME_LINE = re.compile(r"(?P<locale>[A-Za-z_]+(?:@[a-z]+)?)(?:\.utf8)?=(?P<text>.*)")
_SPOKEN = re.compile(r"(?P<stamp>.+?)(?P<desc>_desc)?(?:_(?P<locale>[a-z]{2,3}(?:_[A-Za-z]{2})?))?")
_SCRIPTS = {"latin": "Latn", "cyrillic": "Cyrl"}
_TURNED = re.compile(r".*_(mirror|flip|mirror_flip|shadow)")
_ARTICLE = re.compile(r"^(?:a|an|the|some) ")


@dataclass(frozen=True, kw_only=True)
class StampSound:
    """A sound of a stamp: its file, the member it becomes, its language (none: no words)."""

    file: str
    member: str
    role: str
    language: str | None


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A stamp's files by their paths in the package."""

    name: str
    picture: str
    text: str
    sounds: tuple[StampSound, ...]


def language_tag(locale: str) -> str:
    """A POSIX locale as a BCP 47 tag: pt_BR -> pt-BR, ca@valencia -> ca-valencia."""
    language, _, modifier = locale.partition("@")
    language, _, region = language.partition("_")
    parts = [language.lower(), _SCRIPTS.get(modifier, modifier), region.upper()]
    if modifier not in _SCRIPTS:
        parts = [parts[0], parts[2], parts[1]]
    return "-".join(part for part in parts if part)


def list_stamps(files: Iterable[str], root: str) -> tuple[list[Stamp], list[str]]:
    """The stamps under a folder by name, and the pictures that have no names."""
    below = {PurePosixPath(file).relative_to(root) for file in files if file.startswith(f"{root}/")}
    pictures: dict[str, str] = {}
    for suffix in PICTURES:  # pixels as they are before a drawing that is to be rendered
        for path in sorted(below):
            if path.suffix == f".{suffix}" and not _TURNED.fullmatch(path.stem):
                pictures.setdefault(path.with_suffix("").as_posix(), f"{root}/{path}")
    texts = {path.with_suffix("").as_posix() for path in below if path.suffix == ".txt"}
    sounds = _sounds_of(sorted(below), pictures.keys(), root)
    stamps = [
        Stamp(
            name=name,
            picture=pictures[name],
            text=f"{root}/{name}.txt",
            sounds=tuple(sounds.get(name, ())),
        )
        for name in sorted(pictures.keys() & texts)
    ]
    return stamps, sorted(pictures[name] for name in pictures.keys() - texts)


def _sounds_of(
    paths: Iterable[PurePosixPath], stamps: Iterable[str], root: str
) -> dict[str, list[StampSound]]:
    known = set(stamps)
    found: dict[str, list[StampSound]] = {}
    for path in paths:
        if path.suffix.removeprefix(".") not in SOUNDS:
            continue
        stem = path.with_suffix("").as_posix()
        name, role, locale = _parse_sound(stem, known)
        if name is None:
            continue
        language = language_tag(locale) if locale else ("en" if role == "name" else None)
        label = f"spoken-{language.lower()}" if language else "sound"
        if role == "sound" and language:
            role = "spoken sound"
        member = f"{label}{path.suffix}"
        listed = found.setdefault(name, [])
        if any(sound.member == member for sound in listed):  # a digit's sound says its name, too
            member = f"{label}-2{path.suffix}"
        listed.append(
            StampSound(file=f"{root}/{path}", member=member, role=role, language=language)
        )
    return found


def _parse_sound(stem: str, known: set[str]) -> tuple[str | None, str, str | None]:
    """Which stamp a sound belongs to, its role, its locale."""
    if stem in known:
        return stem, "sound", None
    match = _SPOKEN.fullmatch(stem)
    if match is None or match["stamp"] not in known:
        return None, "", None
    return match["stamp"], "name" if match["desc"] else "sound", match["locale"]


def parse_names(text: str) -> dict[str, str]:
    """Names by language tag, English first; empty ones are left out."""
    lines = text.removeprefix("\ufeff").splitlines()
    names = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        match = _NAME_LINE.fullmatch(line.strip())
        if match is not None:
            names.setdefault(language_tag(match["locale"]), match["text"].strip())
    return {language: name for language, name in names.items() if name}


def concept_of(names: Mapping[str, str], stamp: str) -> str:
    """What a stamp shows, whoever drew it: its English name without article, case and marks."""
    name = unicodedata.normalize("NFKC", names.get("en", "")).lower()
    words = " ".join(re.findall(r"\w+", name))
    return _ARTICLE.sub("", words) or stamp

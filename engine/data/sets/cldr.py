"""Names of emoji from Unicode CLDR, by concept and language: the short name and its keywords.

The "derived" names are those that CLDR composes (skin tones, families). Which code points are one
concept is in emoji_concepts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from carillon.engine.config import UserError
from carillon.engine.data.sets.emoji_concepts import concept_of_text
from carillon.engine.data.sets.npm import Package, read_json, read_members

Names = dict[str, dict[str, tuple[str, list[str]]]]

NAMES = Package(
    spec="cldr-annotations-full@48.2.0",
    sha256="28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
)
DERIVED_NAMES = Package(
    spec="cldr-annotations-derived-full@48.2.0",
    sha256="4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
)
NAMES_LICENCE = "Unicode-3.0"


def read_names(
    folder: Path,
    languages: Sequence[str],
    *,
    names: Package = NAMES,
    derived_names: Package = DERIVED_NAMES,
) -> Names:
    """concept -> language -> (short name, keywords). Raises UserError for an unknown language."""
    found: Names = {}
    for package, kind in (
        (names, "annotations"),
        (derived_names, "annotationsDerived"),
    ):
        path = folder / package.file
        members = read_members(path)
        known = sorted(name.split("/")[2] for name in members if name.count("/") == 3)
        for language in languages:
            if language not in known:
                raise UserError(f"--languages {language}: CLDR has {', '.join(known)}")
            member = f"package/{kind}/{language}/annotations.json"
            annotations = read_json(members, member, path)[kind]["annotations"]
            for characters, entry in annotations.items():
                if name := next(iter(entry.get("tts", [])), ""):
                    by_language = found.setdefault(concept_of_text(characters), {})
                    by_language.setdefault(language, (name, entry.get("default", [])))
    return found

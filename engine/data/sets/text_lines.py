"""`carillon data text-lines`: lines of text in 24 scripts as pictures, for reading text (OCR).

A sample is a picture of one to three lines: names and keywords of emoji from Unicode CLDR, drawn
with a face of the Noto family and varied by the seed in size, colour, angle and noise. Its `lines`
have the text, a box and the exact polygon of each line. A tenth of the concepts is held out, in
every language, so no held-out line is seen in training.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.sets.build import (
    Collected,
    Item,
    Recipe,
    add_build_arguments,
    add_drawn_arguments,
    build_set,
    drawn_settings,
    is_heldout,
    parse_languages,
    shared,
    told,
)
from carillon.engine.data.sets.cldr import DERIVED_NAMES, NAMES, NAMES_LICENCE, Names, read_names
from carillon.engine.data.sets.debian import fetch_packages
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.line_pictures import check_shaping, draw_lines, draw_style
from carillon.engine.data.sets.npm import Package, locate_packages
from carillon.engine.data.sets.script_fonts import (
    FONT_LICENCE,
    FONT_PACKAGES,
    SCRIPTS,
    Face,
    characters_in,
    characters_of,
    faces_of,
    font_bytes,
    is_written_in,
)
from carillon.engine.data.shards import Dataset

EXAMPLES = """examples:
  carillon data text-lines
  carillon data text-lines --languages ar,hi,th --per-language 50 --out data/text-lines-three
  carillon data text-lines --seed 1 --out data/text-lines-1
"""

_RECIPE = 1
_MAX_LINE_CHARS = 40
_HELDOUT_SHARE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data text-lines`."""
    add_drawn_arguments(parser, SCRIPTS, "pictures")
    packages = "Debian and npm packages' files"
    add_build_arguments(parser, "text-lines", packages=packages, workers=True)


def main(args: argparse.Namespace) -> int:
    """Run `carillon data text-lines` and print what the set holds. Raises UserError."""
    dataset = build_text_lines(
        args.out,
        languages=parse_languages(args.languages),
        per_language=args.per_language,
        seed=args.seed,
        **shared(args),
    )
    return told(dataset, "pictures")


@dataclass(frozen=True, kw_only=True)
class LineJob:
    """A picture: its lines with the concept of each, and the face that draws them."""

    key: str
    split: str
    language: str
    lines: tuple[str, ...]
    concepts: tuple[str, ...]
    face: Face
    seed: int


def build_text_lines(
    out: Path,
    *,
    languages: Sequence[str] = tuple(SCRIPTS),
    per_language: int = 100,
    seed: int = 0,
    data: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    names: tuple[Package, Package] = (NAMES, DERIVED_NAMES),
) -> Dataset:
    """Build the set at `out`, or open it when it is there. Raises UserError as `build_set` does."""
    recipe = Recipe(
        name="text-lines",
        version=_RECIPE,
        settings=drawn_settings(languages, SCRIPTS, per_language, seed),
        collect=lambda: _collect(languages, per_language, seed, data, names),
        make=make_picture,
    )
    return build_set(recipe, out, limit=limit, workers=workers, overwrite=overwrite)


def _collect(
    languages: Sequence[str],
    per_language: int,
    seed: int,
    data: Path | None,
    names: tuple[Package, Package],
) -> Collected[LineJob]:
    tools = check_shaping()
    folder = locate_packages(names, data)
    fonts = fetch_packages(FONT_PACKAGES, data)
    named = read_names(folder, languages, names=names[0], derived_names=names[1])
    jobs: list[LineJob] = []
    for language in languages:
        faces = faces_of(language, fonts.values())
        jobs += _jobs_of(language, faces, _texts_of(named, language), per_language, seed)
    if not jobs:
        raise UserError("no name in these languages can be drawn with these fonts")
    sums = {package.spec: package.sha256 for package in fonts.values()}
    sums |= {f"npm:{package.spec}": package.sha256 or "" for package in names}
    return Collected(packages=sums, jobs=jobs, tools=tools)


def _texts_of(names: Names, language: str) -> dict[str, list[str]]:
    """What can stand in a line, by concept: a name alone, or keywords one after another."""
    script = SCRIPTS[language]
    found: dict[str, list[str]] = {}
    for concept in sorted(names):
        name, keywords = names[concept].get(language, ("", []))
        written = [text for text in (name, *keywords) if is_written_in(text, script)]
        line = ""
        for keyword in written[1:]:
            longer = f"{line}{script.comma}{keyword}" if line else keyword
            if len(longer) <= _MAX_LINE_CHARS:
                line = longer
        lines = {text: None for text in (*written[:1], line) if text}
        if kept := [text for text in lines if len(text) <= _MAX_LINE_CHARS]:
            found[concept] = kept
    return found


def _pools(
    faces: Sequence[Face], texts: Mapping[str, Sequence[str]]
) -> dict[tuple[bool, Face], list[tuple[str, str]]]:
    """(concept, text) that are held out, and that are not, by the face that can draw them."""
    is_out = {concept: is_heldout(base_concept(concept)) for concept in texts}
    trained = {text for concept, lines in texts.items() if not is_out[concept] for text in lines}
    pools: dict[tuple[bool, Face], list[tuple[str, str]]] = {}
    for concept, lines in texts.items():
        for text in lines:
            if is_out[concept] and text in trained:  # two concepts may share a keyword
                continue
            needed = characters_in(text)
            for face in faces:
                if needed <= characters_of(face):
                    pools.setdefault((is_out[concept], face), []).append((concept, text))
    return pools


def _jobs_of(
    language: str,
    faces: Sequence[Face],
    texts: Mapping[str, Sequence[str]],
    per_language: int,
    seed: int,
) -> Iterator[LineJob]:
    """The pictures of a language: each a split, a face and lines that it can draw, by chance."""
    draws = random.Random(f"{seed} {language}")
    pools = _pools(faces, texts)
    usable = [face for face in faces if pools.get((False, face)) and pools.get((True, face))]
    for number in range(per_language if usable else 0):
        face, heldout = draws.choice(usable), draws.random() < _HELDOUT_SHARE
        pool = pools[heldout, face]
        chosen = draws.sample(pool, min(len(pool), draws.choice((1, 1, 1, 2, 2, 3))))
        yield LineJob(
            key=f"{language}-{number:05d}",
            split="heldout_text" if heldout else "train",
            language=language,
            lines=tuple(text for _, text in chosen),
            concepts=tuple(concept for concept, _ in chosen),
            face=face,
            seed=seed,
        )


def make_picture(job: LineJob) -> Item:
    """Draw a picture."""
    script = SCRIPTS[job.language]
    style = draw_style(random.Random(f"{job.seed} {job.key}"))
    picture = draw_lines(
        job.lines,
        font_bytes(job.face),
        style,
        face_index=job.face.index,
        language=job.language,
        right_to_left=script.right_to_left,
    )
    lines: list[dict[str, Any]] = []
    for text, polygon in zip(job.lines, picture.polygons, strict=True):
        xs, ys = zip(*polygon, strict=True)
        box = [min(xs), min(ys), max(xs), max(ys)]
        lines.append({"text": text, "box": box, "polygon": [list(corner) for corner in polygon]})
    meta = {
        "captions": {job.language: [" ".join(job.lines)]},
        "lines": lines,
        "script": script.name,
        "concepts": list(job.concepts),
        "style": {
            "font_size": style.font_size,
            "turn_degrees": round(style.turn_degrees, 3),
            "ink": list(style.ink),
            "paper": list(style.paper),
            "noise": round(style.noise, 3),
            "blur": round(style.blur, 3),
        },
        "font": job.face.file.rpartition("/")[2],
        "font_source": f"{job.face.package} {job.face.file}",
        "font_licence": FONT_LICENCE,
        "licence": NAMES_LICENCE,
        "licence_source": f"npm:{NAMES.spec} package/LICENSE",
        "source": f"npm:{NAMES.spec}",
        "media": {"jpg": {"width": picture.width, "height": picture.height}},
    }
    return Item(key=job.key, split=job.split, members={"jpg": picture.jpeg}, meta=meta)

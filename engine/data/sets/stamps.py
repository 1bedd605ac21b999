"""`carillon data stamps`: TuxPaint's stamps, with their names in 78 languages, written and spoken.

A sample is a picture (with its transparency), its names as captions, people saying its name in up
to a dozen languages (`spoken-es.ogg`, the transcript beside it) and the sound of what it shows
(`sound.ogg`). All comes from Debian's package tuxpaint-stamps-default and is stored as it is there;
only drawings (SVG) are rendered, to lossless WebP. A tenth of the concepts is held out: stamps
with one English name belong together, whoever drew them.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import ImageError, decode_rgb
from carillon.engine.data.sets.build import (
    Collected,
    Item,
    LeftOut,
    Recipe,
    add_build_arguments,
    build_set,
    is_heldout,
    shared,
    told,
)
from carillon.engine.data.sets.debian import DebianPackage, fetch_packages
from carillon.engine.data.sets.sound import SoundError, read_facts
from carillon.engine.data.sets.stamp_files import (
    SOUNDS,
    Stamp,
    StampSound,
    concept_of,
    list_stamps,
    parse_names,
)
from carillon.engine.data.shards import Dataset

PACKAGE = "tuxpaint-stamps-default"
LICENCE = "GPL-2.0-only"
EXAMPLES = """examples:
  carillon data stamps
  carillon data stamps --limit 100 --out data/stamps-100
  carillon data stamps --data ~/debs      with the .deb there, without apt or a network
"""

_ROOT = "usr/share/tuxpaint/stamps"
_COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
_RECIPE = 1
_DRAWN_SIDE = 512
# They reach for files, fonts or entities; a picture inside the drawing is none of them.
_UNDRAWABLE = re.compile(r'<text\b|<script\b|<!ENTITY|href="(?!#|data:)', re.I)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data stamps`."""
    add_build_arguments(parser, "stamps", packages="Debian package's file (.deb)", workers=True)


def main(args: argparse.Namespace) -> int:
    """Run `carillon data stamps` and print what the set holds. Raises UserError."""
    dataset = build_stamps(
        args.out,
        **shared(args),
    )
    return told(dataset, "stamps")


@dataclass(frozen=True, kw_only=True)
class StampJob:
    """A stamp, and the package that its files are read from."""

    stamp: Stamp
    package: DebianPackage


def build_stamps(
    out: Path,
    *,
    data: Path | None = None,
    limit: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Build the set at `out`, or open it when it is there. Raises UserError as `build_set` does."""
    recipe = Recipe(
        name="stamps", version=_RECIPE, settings={}, collect=lambda: _collect(data), make=make_stamp
    )
    return build_set(recipe, out, limit=limit, workers=workers, overwrite=overwrite)


def _collect(data: Path | None) -> Collected[StampJob]:
    package = fetch_packages([PACKAGE], data)[PACKAGE]
    if _COPYRIGHT not in package.members:
        raise UserError(f"{package.spec} does not state its licence in {_COPYRIGHT}")
    stamps, nameless = list_stamps(package.members, _ROOT)
    if not stamps:
        raise UserError(f"{package.spec} holds no stamps under {_ROOT}")
    used = {sound.file for stamp in stamps for sound in stamp.sounds}
    is_sound = (file for file in package.members if file.endswith(SOUNDS))
    left_out = [LeftOut(key=file, reason="a picture without names") for file in nameless]
    left_out += [
        LeftOut(key=file, reason="a sound without a picture")
        for file in sorted(is_sound)
        if file not in used
    ]
    return Collected(
        packages={package.spec: package.sha256},
        jobs=[StampJob(stamp=stamp, package=package.of(_files_of(stamp))) for stamp in stamps],
        left_out=left_out,
    )


def _files_of(stamp: Stamp) -> list[str]:
    return [stamp.picture, stamp.text, *(sound.file for sound in stamp.sounds)]


def make_stamp(job: StampJob) -> Item | LeftOut:
    """Read a stamp's files into a sample. A sound that cannot be decoded is left out of it."""
    stamp, package = job.stamp, job.package
    key = re.sub(r"[./ ]+", "-", stamp.name)
    try:
        names = parse_names(package.read(stamp.text).decode("utf-8"))
        suffix, picture, size = _picture(package.read(stamp.picture), stamp.picture)
    except (UnicodeDecodeError, ImageError) as error:
        return LeftOut(key=key, reason=str(error))
    members = {suffix: picture}
    media: dict[str, dict[str, Any]] = {suffix: {"width": size[0], "height": size[1]}}
    damaged: dict[str, str] = {}
    for sound in stamp.sounds:
        content = package.read(sound.file)
        try:
            facts = read_facts(content)
        except SoundError as error:
            damaged[sound.member] = str(error)
            continue
        members[sound.member] = content
        spoken = {"language": sound.language} if sound.language else {}
        media[sound.member] = facts.as_media(role=sound.role, **spoken)
    said = _transcripts(stamp.sounds, members, names)
    concept = concept_of(names, stamp.name)
    meta = {
        "captions": {language: [name] for language, name in names.items()},
        **({"transcripts": said} if said else {}),
        "concept": concept,
        "category": PurePosixPath(stamp.name).parent.as_posix(),
        "licence": LICENCE,
        "licence_source": f"{package.spec} {_COPYRIGHT}",
        "source": f"{package.spec} {stamp.picture}",
        "author": "Bill Kendrick and the contributors of Tux Paint",
        "media": media,
        **({"damaged": damaged} if damaged else {}),
    }
    split = "heldout_concept" if is_heldout(concept) else "train"
    return Item(key=key, split=split, members=members, meta=meta)


def _transcripts(
    sounds: tuple[StampSound, ...], members: Mapping[str, bytes], names: Mapping[str, str]
) -> dict[str, list[str]]:
    """What is said in the sounds that say the stamp's name."""
    said = {s.language or "" for s in sounds if s.role == "name" and s.member in members}
    return {language: [names[language]] for language in sorted(said & names.keys())}


def _picture(data: bytes, file: str) -> tuple[str, bytes, tuple[int, int]]:
    """A stamp's picture: its suffix, bytes and size. Raises ImageError."""
    if not file.endswith(".svg"):
        return PurePosixPath(file).suffix.removeprefix("."), data, decode_rgb(data).size
    import resvg_py
    from PIL import Image

    svg = data.decode("utf-8")
    if found := _UNDRAWABLE.search(svg):
        raise ImageError(f"the drawing holds {found[0]}, which needs files or fonts of its own")
    box = _DRAWN_SIDE  # that the drawing is fitted in
    try:
        drawn = resvg_py.svg_to_bytes(
            svg_string=svg, width=box, height=box, dpi=96, skip_system_fonts=True
        )
    except ValueError as error:
        raise ImageError(f"the drawing cannot be rendered: {error}") from None
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(bytes(drawn)), formats=["PNG"]) as image:
        image.save(buffer, "WEBP", lossless=True, exact=True, method=4)
        return "webp", buffer.getvalue(), image.size

"""Reads the pictures of the emoji set's packages, joined with concepts.

An Iconify pack lists its icons' code points in chars.json; the older ones do not and are joined by
icon name with the naming pack. SVG bodies become whole documents, not yet rendered.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data.sets.emoji_concepts import concept_of_hex
from carillon.engine.data.sets.emoji_sources import Pack, Sources
from carillon.engine.data.sets.npm import read_json, read_members

_MAX_SIDE = 4096
_FORBIDDEN = ("<image", "<text", "<script", "<foreignObject", "<!")


@dataclass(frozen=True)
class Picture:
    """One picture to render: an SVG document, or encoded raster bytes."""

    concept: str
    pack: Pack
    content: str | bytes


def read_pictures(
    folder: Path, sources: Sources, names: Mapping[str, Mapping[str, Any]]
) -> list[Picture]:
    """All pictures of named concepts, one for each concept and pack, in a fixed order."""
    slugs: dict[str, str] = {}
    pictures: list[Picture] = []
    for pack in sorted(sources.packs, key=lambda pack: pack.vendor != sources.naming):
        path = folder / pack.package.file
        members = read_members(path)
        found: Mapping[str, str | bytes]
        if pack.raster:
            found = _raster_icons(members)
        else:
            icons = read_json(members, "package/icons.json", path)
            listed = read_json(members, "package/chars.json", path)
            by_concept = _join(icons, listed, slugs)
            if pack.vendor == sources.naming:
                slugs = _slugs(icons, by_concept)
            found = {concept: _svg(icons, name) for concept, name in by_concept.items()}
        kept = ((concept, content) for concept, content in found.items() if concept in names)
        pictures += [Picture(concept, pack, content) for concept, content in kept]
    if not pictures:
        raise UserError(f"no picture in {folder} has a name in the languages asked for")
    return sorted(pictures, key=lambda picture: (picture.concept, picture.pack.vendor))


def draw_picture(content: str | bytes, side: int) -> Image.Image:
    """A picture's content with its transparency, `side` pixels square. Raises UserError."""
    if isinstance(content, bytes):
        file = io.BytesIO(content)
    else:
        import resvg_py

        svg = content.replace('"SIZE"', f'"{side}"')
        try:
            # Loading system fonts would cost 20 times the rendering and differ by machine.
            file = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))
        except ValueError as error:
            raise UserError(f"a picture of the packages cannot be rendered: {error}") from None
    try:
        with Image.open(file, formats=["PNG", "WEBP"]) as image:
            if max(image.size) > _MAX_SIDE:
                raise UserError(f"a picture of the packages has {image.width} x {image.height}")
            # Premultiplied, so that the colour of clear pixels does not bleed into the rim.
            drawn = image.convert("RGBA").convert("RGBa")
            return drawn.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise UserError(f"a picture of the packages cannot be read: {error}") from None


def _join(
    icons: Mapping[str, Any], listed: Mapping[str, str], slugs: Mapping[str, str]
) -> dict[str, str]:
    """concept -> icon name, by the pack's own code points, or else by the naming pack's names."""
    pairs = (
        [(concept_of_hex(points), name) for points, name in sorted(listed.items())]
        if listed
        else [(slugs[name], name) for name in sorted(icons["icons"]) if name in slugs]
    )
    joined: dict[str, str] = {}
    for concept, name in pairs:
        if name in icons["icons"]:
            joined.setdefault(concept, name)
    return joined


def _slugs(icons: Mapping[str, Any], by_concept: Mapping[str, str]) -> dict[str, str]:
    """icon name -> concept, plain aliases included."""
    slugs = {name: concept for concept, name in by_concept.items()}
    for alias, entry in icons.get("aliases", {}).items():
        if set(entry) == {"parent"} and entry["parent"] in slugs:
            slugs.setdefault(alias, slugs[entry["parent"]])
    return slugs


def _raster_icons(members: Mapping[str, bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in sorted(members):
        if name.startswith("package/assets/") and name.endswith(".webp"):
            points = name.removeprefix("package/assets/").removesuffix(".webp")
            found.setdefault(concept_of_hex(points), members[name])
    return found


def _svg(icons: Mapping[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = str(icon["body"])
    if any(tag in body for tag in _FORBIDDEN):  # they reach for files, fonts or entities
        raise UserError(f"the icon {name!r} holds one of {', '.join(_FORBIDDEN)}")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="SIZE" height="SIZE">{body}</svg>'
    )

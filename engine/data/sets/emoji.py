"""`carillon data emoji`: pictures of emoji by eight vendors with their names in thirty languages.

Pictures come from npm packages of openly licensed art, names from Unicode CLDR: the caption is
CLDR's short name ("tts"), its search keywords are kept beside it under `keywords`. Art is rendered
at the size asked for, on white, and stored as lossless WebP (at 64 px half of PNG's bytes, and
Pillow decodes it in 51 us against 61). Packs that do not list code points are joined on the names
of Noto's icons. Both a vendor and a tenth of the base concepts are held out.
The same packages and settings give the same bytes; a finished set is reused.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import ImageError, decode_rgb
from carillon.engine.data.manifest import MANIFEST_NAME
from carillon.engine.data.process_map import ordered_map
from carillon.engine.data.sets.build import is_heldout, parse_languages, told
from carillon.engine.data.sets.cldr import read_names
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.emoji_pictures import Picture, read_pictures
from carillon.engine.data.sets.emoji_sources import SOURCES, Sources
from carillon.engine.data.sets.npm import locate_packages
from carillon.engine.data.shards import Dataset, ShardWriter, open_dataset

LANGUAGES = (
    *("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "ru", "uk", "sv", "fi", "el", "hu"),
    *("tr", "ar", "fa", "he", "hi", "bn", "ta", "th", "vi", "id", "sw", "ja", "ko", "zh", "ur"),
)
EXAMPLES = """examples:
  carillon data emoji
  carillon data emoji --size 224 --out data/emoji-224 --workers 8
  carillon data emoji --languages en,ja,ar --out data/emoji-three
  carillon data emoji --data ~/npm-tarballs      without npm or a network
"""

_RECIPE = 2  # part of what makes two sets the same: raise it when the bytes would change
_MAX_SIZE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `carillon data emoji`."""
    parser.add_argument(
        "--out", type=Path, default=Path("data/emoji"), help="folder to write (data/emoji)"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels per side, 16-1024 (64)")
    parser.add_argument(
        "--data", type=Path, help="folder of the npm tarballs, when npm or the network is missing"
    )
    parser.add_argument(
        "--languages", default=",".join(LANGUAGES), help="comma-separated CLDR codes (thirty)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="rendering processes (all cores)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set built with other settings"
    )


def main(args: argparse.Namespace) -> int:
    """Run `carillon data emoji` and print what the set holds. Raises UserError."""
    languages = parse_languages(args.languages)
    dataset = build_emoji(
        args.out,
        size=args.size,
        languages=languages,
        data=args.data,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    return told(dataset, "pictures")


def build_emoji(
    out: Path,
    *,
    size: int = 64,
    languages: Sequence[str] = LANGUAGES,
    data: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    sources: Sources = SOURCES,
) -> Dataset:
    """Build the set at `out`, or open it when it was built with the same settings.

    Raises UserError for bad settings, missing packages, or another set at `out`.
    """
    if not 16 <= size <= _MAX_SIZE:
        raise UserError(f"--size {size} is out of range; 16 to {_MAX_SIZE} pixels are allowed")
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one process is needed")
    if not languages or len(set(languages)) != len(languages):
        raise UserError(f"--languages {','.join(languages)}: give each language once")
    packages = {package.spec: package.sha256 for package in sources.packages}
    source = {"kind": "emoji", "recipe": _RECIPE, "size": size, "packages": packages}
    source["languages"] = list(languages)
    if (out / MANIFEST_NAME).is_file() and not overwrite:
        dataset = open_dataset(out)
        if dataset.manifest.source == source:
            return dataset
        raise UserError(f"{out} was built with other settings. Give --out or --overwrite.")
    # Opened first: an `out` that cannot be written is told before anything is fetched.
    with ShardWriter(out, name="emoji", source=source, overwrite=overwrite) as writer:
        folder = locate_packages(sources.packages, data)
        names = read_names(
            folder, languages, names=sources.names, derived_names=sources.derived_names
        )
        pictures = read_pictures(folder, sources, names)
        for picture, media in zip(pictures, _render_all(pictures, size, workers), strict=True):
            _write(writer, picture, media, names[picture.concept], sources, size)
    return open_dataset(out)


def _write(
    writer: ShardWriter,
    picture: Picture,
    media: bytes,
    names: Mapping[str, tuple[str, list[str]]],
    sources: Sources,
    size: int,
) -> None:
    base = base_concept(picture.concept)
    concept_out, vendor_out = is_heldout(base), picture.pack.vendor == sources.heldout_vendor
    split = {
        (False, False): "train",
        (False, True): "heldout_vendor",
        (True, False): "heldout_concept",
        (True, True): "heldout_both",
    }[concept_out, vendor_out]
    meta = {
        "captions": {language: [name] for language, (name, _) in names.items()},
        "keywords": {language: words for language, (_, words) in names.items() if words},
        "concept": picture.concept,
        "base_concept": base,
        "vendor": picture.pack.vendor,
        "licence": picture.pack.licence,
        "author": picture.pack.author,
        "caption_licence": sources.names_licence,
        "licence_source": f"npm:{picture.pack.package.spec} package/package.json",
        "source": f"npm:{picture.pack.package.spec}",
        "media": {"webp": {"width": size, "height": size}},
    }
    writer.write(f"{picture.pack.vendor}-{picture.concept}", {"webp": media}, meta, split=split)


def _render_all(pictures: Sequence[Picture], size: int, workers: int) -> Iterator[bytes]:
    """Encoded pictures in the order given, however many processes render them."""
    from rich.progress import track

    render = partial(_render, size=size)
    rendered = ordered_map(render, (picture.content for picture in pictures), workers=workers)
    yield from track(rendered, total=len(pictures), description="rendering")


def _render(content: str | bytes, size: int) -> bytes:
    from PIL import Image

    try:
        if isinstance(content, str):
            import resvg_py

            svg = content.replace('"SIZE"', f'"{size}"')
            # Loading system fonts would cost 20 times the rendering and differ by machine.
            png = resvg_py.svg_to_bytes(
                svg_string=svg, background="#ffffff", skip_system_fonts=True
            )
            image = decode_rgb(png)
        else:
            image = decode_rgb(content).resize((size, size), Image.Resampling.LANCZOS)
    except (ImageError, ValueError) as error:
        raise UserError(f"a picture of the packages cannot be rendered: {error}") from None
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=4)
    return buffer.getvalue()

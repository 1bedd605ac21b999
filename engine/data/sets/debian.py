"""Debian packages as sources of data: fetched by name, read by member name, never installed.

`apt-get download` fetches the version of the user's own release and checks it by the release's
signed sums; its SHA-256 is kept beside it, and recorded in the set. The package's files are kept as
one uncompressed tar in the cache, from which members are read at their offsets: nothing is
extracted, and no code of a package runs. Left out: pinned versions, since a release has but one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.sets.programs import (
    cache_folder,
    find_program,
    run_program,
    stream_program,
)
from carillon.engine.data.tar_members import TarError, TarMember, iter_members
from carillon.engine.file_hash import file_sha256

_FETCH_TIMEOUT_S = 1800
_UNPACK_TIMEOUT_S = 600
_MAX_UNPACKED_BYTES = 1 << 30  # the largest, the stamps, has 230 MB
_MAX_MEMBERS = 100_000
_FILE_NAME = re.compile(r"(?P<name>[a-z0-9.+-]+)_(?P<version>[^_/]+)_(?P<arch>[a-z0-9]+)\.deb")


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """A fetched package: its file's sum and version, and the tar of what it holds."""

    name: str
    version: str
    sha256: str
    tar: Path
    members: Mapping[str, TarMember]

    @property
    def spec(self) -> str:
        return f"debian:{self.name}={self.version}"

    def of(self, names: Iterable[str]) -> DebianPackage:
        """The package with some of its files only, which is less to hand to other processes."""
        return replace(self, members={name: self.members[name] for name in names})

    def read(self, name: str, *, max_bytes: int = 256 << 20) -> bytes:
        """The bytes of a member. Raises UserError when it is absent or larger."""
        member = self.members.get(name)
        if member is None:
            raise UserError(f"the package {self.name} {self.version} has no file {name}")
        if member.size > max_bytes:
            raise UserError(f"{name} of {self.name} has more than {max_bytes >> 20} MB")
        with self.tar.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def fetch_packages(names: Sequence[str], data: Path | None) -> dict[str, DebianPackage]:
    """Packages by name: from the folder `data` as given, or from a cache that apt fills.

    Raises UserError when one is missing from `data`, cannot be fetched, or is damaged.
    """
    folder = data if data is not None else cache_folder("debian")
    missing = [name for name in names if not _files_of(name, folder)]
    if missing:
        _fetch(missing, folder, given=data is not None)
    return {name: _open_package(name, folder) for name in names}


def _files_of(name: str, folder: Path) -> list[Path]:
    matches = ((_FILE_NAME.fullmatch(unquote(path.name)), path) for path in _debs(folder))
    return [path for match, path in matches if match is not None and match["name"] == name]


def _debs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.deb"))


def _fetch(names: Sequence[str], folder: Path, *, given: bool) -> None:
    command = f"apt-get download {' '.join(names)}"
    if given:
        raise UserError(f"{folder} lacks {', '.join(names)}. Run `{command}` in that folder.")
    try:
        apt = find_program("apt-get", "apt")
    except UserError:
        raise UserError(
            f"apt-get was not found. On a Debian or Ubuntu machine run `{command}` in a folder, "
            "and give that folder as --data."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as place:
            run_program(
                [apt, "-qq", "download", *names], timeout_s=_FETCH_TIMEOUT_S, folder=Path(place)
            )
            for path in _debs(Path(place)):
                _keep_sum(path, folder / path.name)
                path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {explained(error)}") from None
    except UserError as error:
        raise UserError(
            f"{error}. Try `apt-get update`, or run `{command}` on a Debian machine and give its "
            "folder as --data."
        ) from None


def _keep_sum(path: Path, final: Path) -> None:
    _sum_file(final).write_text(file_sha256(path) + "\n")


def _kept_sum(path: Path) -> str | None:
    """The sum that was kept beside a file; none for a file that somebody else put there."""
    return _sum_file(path).read_text().strip() if _sum_file(path).is_file() else None


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _open_package(name: str, folder: Path) -> DebianPackage:
    found = _files_of(name, folder)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} must hold one file of the package {name}; it has {listed}")
    path = found[0]
    sha256 = file_sha256(path)
    if _kept_sum(path) not in (None, sha256):
        raise UserError(f"{path} is not what was fetched. Remove it and fetch it again.")
    tar = cache_folder("debian") / f"{sha256}.tar"
    if not tar.is_file():
        _unpack(path, tar)
    elif _kept_sum(tar) != file_sha256(tar):
        raise UserError(f"{tar} was damaged after it was written. Remove it and try again.")
    match = _FILE_NAME.fullmatch(unquote(path.name))
    assert match is not None
    return DebianPackage(
        name=name, version=match["version"], sha256=sha256, tar=tar, members=_members_of(tar)
    )


def _unpack(path: Path, tar: Path) -> None:
    """Put the package's files into one tar, whole or not at all."""
    dpkg = find_program("dpkg-deb", "dpkg")
    partial = tar.with_name(f".{tar.name}.{os.getpid()}.partial")
    try:
        tar.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            stream_program(
                [dpkg, "--fsys-tarfile", path],
                out,
                max_bytes=_MAX_UNPACKED_BYTES,
                timeout_s=_UNPACK_TIMEOUT_S,
            )
        _members_of(partial)
        _keep_sum(partial, tar)
        partial.replace(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be written: {explained(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def _members_of(tar: Path) -> dict[str, TarMember]:
    """The regular files by path. Raises UserError for a damaged tar."""
    members: dict[str, TarMember] = {}
    try:
        with tar.open("rb") as file:
            for member in iter_members(file, tar.stat().st_size):
                if member.kind == "file":
                    members[member.name.removeprefix("./")] = member
                if len(members) > _MAX_MEMBERS:
                    raise TarError(f"more than {_MAX_MEMBERS:,} files")
    except (OSError, TarError) as error:
        raise UserError(f"{tar} cannot be read: {error}. Remove it and try again.") from None
    return members

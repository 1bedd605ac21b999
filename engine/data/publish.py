"""Puts what is finished under its final name, and refuses names that hold something else.

A file takes the place of a file alone. A folder is replaced only when it is of the kind that takes
its place: nothing that a user keeps can be lost to a mistyped `--out`. The check runs before the
work and again right before the rename, since hours may lie between. Left out: locks; of two writers
of one name the last is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carillon.engine.access import explained
from carillon.engine.config import UserError


def check_target(out: Path, kind: str, is_kind: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raise UserError unless `out` is free, or is to be overwritten and a folder of the kind."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(f"{out} exists; give another place, remove it, or use --overwrite")
    found = _what_stands(out)
    if found is None and not is_kind(out):
        found = f"a folder that is no {kind} made by carillon"
    if found is not None:
        raise UserError(
            f"{out} is {found}, and --overwrite replaces only a {kind}. Nothing was removed: "
            "give another --out, or move away what stands there."
        )


def json_of(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty when there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def publish_file(out: Path, data: bytes, *, parents: bool = False) -> None:
    """Write a file whole or not at all, with `parents` in a folder made when it is not there.

    Raises UserError when it cannot be written, or something else than a file stands there: a rename
    would put the file in the place of a device.
    """
    if os.path.lexists(out) and not out.is_file():
        kind = "a folder" if out.is_dir() else "no ordinary file"
        raise UserError(f"{out} is {kind}; name a file")
    place = Path(os.path.realpath(out))  # a link stays, what it leads to is replaced
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        if parents:
            place.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {explained(error)}") from None
    finally:
        if os.path.lexists(partial):
            partial.unlink()


def publish_folder(folder: Path, out: Path) -> None:
    """Put a finished folder under its final name, an existing one aside and then away."""
    sync_folder(folder)
    replaced: Path | None = None
    if out.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
    try:
        if replaced is not None:
            os.rename(out, replaced / out.name)
        os.rename(folder, out)
    except OSError:
        if replaced is not None:
            if (replaced / out.name).exists():
                os.rename(replaced / out.name, out)
            replaced.rmdir()  # never with what it holds
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(out.parent)


def _what_stands(out: Path) -> str | None:
    """What makes `out` irreplaceable whatever it holds; none when it is an ordinary folder."""
    if out.is_symlink():
        return "a symbolic link"
    if not out.is_dir():
        return "a file"
    here, place = Path.cwd().resolve(), out.resolve()
    if place == here:
        return "the current folder"
    return "a folder around the current one" if place in here.parents else None


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

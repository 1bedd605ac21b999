"""How a folder of tensors becomes a checkpoint: state, manifest, everything on the disk, its name.

A kill at any moment leaves what bears a final name whole, or nothing of that name. What it leaves
besides ends in `.tmp` and goes at the next start; a whole checkpoint among it comes back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from carillon.engine.file_hash import file_sha256

MANIFEST = "manifest.json"
STATE = "state.json"


def recover(folder: Path) -> None:
    """Bring back whole checkpoints that a kill caught in mid-replacement."""
    for replaced in folder.glob("step-*.old.tmp"):
        final = replaced.with_suffix("").with_suffix("")
        if not final.exists() and (replaced / MANIFEST).is_file():
            replaced.rename(final)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left behind, what is whole aside."""
    recover(folder)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)


def seal(temporary: Path, state: dict[str, Any]) -> None:
    """Complete a folder of tensors and take the `.tmp` from its name.

    A kill leaves the manifest with its folder under the final name, or no final name: then the old
    checkpoint of that step, if there was one, is under `.old.tmp` and `recover` brings it back.
    """
    complete(temporary, state)
    final = temporary.with_suffix("")
    if final.exists():  # the same step again, after a resume from before it
        # Renamed first: a kill in the middle of the removal leaves no half checkpoint.
        final.rename(final.with_suffix(".old.tmp"))
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(final.with_suffix(".old.tmp"), ignore_errors=True)


def complete(temporary: Path, state: dict[str, Any]) -> None:
    """Add state and manifest to a folder of tensors, and have all of it on the disk.

    Files that another process wrote are synced there too: a machine holds back its own writes.
    """
    write_durably(temporary / STATE, json.dumps(state, indent=2).encode())
    files: dict[str, dict[str, object]] = {}
    for path in sorted(temporary.rglob("*")):
        sync(path)
        if path.is_file():
            name, size_bytes = path.relative_to(temporary).as_posix(), path.stat().st_size
            files[name] = {"sha256": file_sha256(path), "size_bytes": size_bytes}
    write_durably(temporary / MANIFEST, json.dumps({"files": files}, indent=2).encode())
    sync(temporary)


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync a file."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

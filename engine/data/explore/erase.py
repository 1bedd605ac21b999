"""Erasure of items: a new version of a set without them, with tombstones in their place.

The new version is written whole beside the old one, in the order of the old, and is there by one
rename or not at all; then the registry is told; then, where asked for, the old files are removed.
A run that was cut short goes on when given again: a version that is already there is known by its
parent and its tombstones. All other samples are copied, so an erasure costs a copy of the set.
What is derived from items by others (a report's examples, lists of removed items) is not copied.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from carillon.engine.access import explained
from carillon.engine.config import UserError
from carillon.engine.data.explore.selection import Found
from carillon.engine.data.manifest import MANIFEST_NAME
from carillon.engine.data.publish import json_of
from carillon.engine.data.samples import SampleError
from carillon.engine.data.shard_writer import ShardWriter
from carillon.engine.data.shards import Dataset, open_dataset
from carillon.engine.data.tombstones import TOMBSTONES_NAME, Tombstones, tombstones_of

RELATION = "delete-subject"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is erased, why, and who asked for it."""

    items: Sequence[Found]
    reason: str
    requested_by: str
    drop_damaged: bool = False

    def code(self, dataset: Dataset) -> str:
        """Stands for these items of this set; a dry run tells it, the erasure may be given it."""
        lines = [dataset.fingerprint, *sorted(one.key for one in self.items)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def check_parent(dataset: Dataset, out: Path) -> None:
    """Raise UserError unless items can be erased from a set into `out`."""
    if not (dataset.path / MANIFEST_NAME).is_file():
        raise UserError(
            f"{dataset.path} holds plain tars; make a data set of them by `carillon ingest` first"
        )
    place, parent = Path(os.path.realpath(out)), Path(os.path.realpath(dataset.path))
    if place == parent or parent in place.parents or place in parent.parents:
        raise UserError(f"--out {out} must be another folder than {dataset.path}, not in or around")


def write_without(
    dataset: Dataset,
    request: Request,
    out: Path,
    *,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """The new version. Raises UserError for damaged samples (unless they are to be dropped), when
    nothing would be left, when `out` is something else, or for a disk that refuses."""
    before = tombstones_of([dataset.path])
    if _is_done(dataset, request, out):
        return open_dataset(out)
    erased = {(one.split, one.row) for one in request.items}
    total = sum(len(split) for split in dataset.splits.values())
    if len(erased) == total:
        raise UserError(
            f"all {total:,} items of {dataset.path} are to be erased, so no version of it is left: "
            "remove its folder, and what was trained on it"
        )
    source = {
        "kind": RELATION,
        "parents": [{"name": dataset.name, "fingerprint": dataset.fingerprint}],
        "num_erased": len(erased),
    }
    with ShardWriter(out, name=name, source=source) as writer:
        places = (
            (name, row) for name, split in dataset.splits.items() for row in range(len(split))
        )
        for done, place in enumerate(places, start=1):
            if place not in erased:
                _copy(dataset, *place, writer, request.drop_damaged)
            progress(done, total)
        writer.attach(TOMBSTONES_NAME, _with(before, dataset, request).content())
    for left in out.absolute().parent.glob(glob.escape(f".{out.name}.partial-") + "*"):
        shutil.rmtree(left, ignore_errors=True)  # of a killed run; it could not be published now
    return open_dataset(out)


def _with(before: Tombstones, dataset: Dataset, request: Request) -> Tombstones:
    return before.with_erasure(
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        erased_at=datetime.now(UTC).isoformat(timespec="seconds"),
        reason=request.reason,
        requested_by=request.requested_by,
        items=[(one.key, one.sha256) for one in request.items],
    )


def _copy(dataset: Dataset, split: str, row: int, writer: ShardWriter, drop_damaged: bool) -> None:
    try:
        sample = dataset.splits[split].read(row)
    except SampleError as error:
        if drop_damaged:
            return
        raise UserError(
            f"{dataset.path}: {error}. Copy the set again, or use --drop-damaged to leave damaged "
            "items out of the new version too"
        ) from None
    meta = dict(sample.meta)
    if not meta["captions"]:
        del meta["captions"]  # the reader's stand-in for none
    try:
        writer.write(sample.key, sample.members, meta, split=split)
    except SampleError as error:
        raise UserError(f"{dataset.path}: {error}") from None


def _is_done(dataset: Dataset, request: Request, out: Path) -> bool:
    """Whether `out` is what this erasure makes, from an earlier time that was cut short."""
    source = json_of(out / MANIFEST_NAME).get("source")
    if not isinstance(source, dict) or source.get("kind") != RELATION:
        return False
    parents = [{"name": dataset.name, "fingerprint": dataset.fingerprint}]
    if source.get("parents") != parents or source.get("num_erased") != len(request.items):
        return False
    last = tombstones_of([out]).erasures[-1:]
    return bool(last) and all(
        Tombstones(last).refusal(one.key, one.sha256) for one in request.items
    )


def files_of(folder: Path) -> list[tuple[str, int]]:
    """What a purge removes, with sizes: every file of the set, and what killed writers of it left
    beside it, which holds the same items."""
    places = (folder, *leftovers_of(folder))
    paths = [path for place in places for path in sorted(place.rglob("*"))]
    return [
        (str(path.relative_to(folder.parent)), path.lstat().st_size)
        for path in paths
        if path.is_symlink() or not path.is_dir()
    ]


def leftovers_of(folder: Path) -> list[Path]:
    """Folders that a writer of this one left when it was killed, or goes on from."""
    name = glob.escape(f".{folder.name}.")
    patterns = ("partial-*", "replaced-*", "ingest", "curation-*")
    found = [path for pattern in patterns for path in folder.parent.glob(name + pattern)]
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def purge(folder: Path) -> None:
    """Remove a set's folder and leftovers: aside first, so that no half of it is taken for a set.

    Raises UserError when it cannot be removed; what is left then has the name of `aside`.
    """
    try:
        if folder.exists():
            folder.rename(aside(folder))
        for left in [*leftovers_of(folder), aside(folder)]:
            shutil.rmtree(left)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be removed: {explained(error)}. The new version is there; give the "
            "same command again"
        ) from None


def aside(folder: Path) -> Path:
    """Where a set stands while it is being removed."""
    return folder.with_name(f".{folder.name}.purged")

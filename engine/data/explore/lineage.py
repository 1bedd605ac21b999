"""`carillon data lineage`: what a set was made from, what from it, and what was trained on it.

All of it is in the registry; the set itself need not be there any more. Indexes are found beside
the runs: `carillon search` keeps vectors under a name that begins with the checkpoint's hash and
the set's fingerprint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from carillon.engine.data.explore.terminal import print_tables, table
from carillon.engine.registry.command import add_registry
from carillon.engine.registry.datasets import Trained, find_dataset, trained_on
from carillon.engine.registry.lineage import Relative, ancestors_of, descendants_of
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import CheckpointRow, DatasetRow, TrainingRunRow

if TYPE_CHECKING:
    from rich.table import Table
    from sqlalchemy.orm import Session

_RUN_COLUMNS = ("dataset", "name", "status", "in_mixture", "split", "from_position", "folder")
_CHECKPOINT_COLUMNS = ("dataset", "run", "step", "content_hash", "is_there", "folder")

EXAMPLES = """examples:
  carillon data lineage data/photos
  carillon data lineage 3f9a1c0b                  by its fingerprint, wherever the set is
  carillon data lineage data/photos --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `carillon data lineage`."""
    add_registry(parser)
    parser.add_argument("dataset", metavar="DATASET", help="a data set's folder or fingerprint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run `carillon data lineage`. Raises RegistryError."""
    registry = Registry.open(args.registry, create=False)
    with registry.reading() as session:
        found = lineage_of(session, find_dataset(session, args.dataset))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print_tables(*lineage_tables(found))
    return 0


def lineage_of(session: Session, row: DatasetRow) -> dict[str, Any]:
    """All that the registry knows of a set's past and future."""
    trained = trained_on(session, row.id)
    once = {one.run.id: one for one in trained}.values()  # a run may read several splits
    hashes = {made.content_hash[:12] for one in once for made in one.checkpoints}
    folders = session.scalars(select(TrainingRunRow.artifacts_uri).distinct())
    return {
        "dataset": _named(row),
        "parents": [_relative(one) for one in ancestors_of(session, row.id)],
        "children": [_relative(one) for one in descendants_of(session, row.id)],
        "runs": [_run(row, one) for one in trained],
        "checkpoints": [_checkpoint(row, one, made) for one in once for made in one.checkpoints],
        "indexes": sorted(_indexes(folders, row.fingerprint[:12], hashes)),
    }


def _run(row: DatasetRow, one: Trained) -> dict[str, Any]:
    return {
        "dataset": row.name,
        "name": one.run.name,
        "status": one.run.status,
        "folder": one.run.artifacts_uri,
        "in_mixture": one.link.name or None,
        "split": one.link.split,
        "from_position": one.link.from_position,
    }


def _checkpoint(row: DatasetRow, one: Trained, made: CheckpointRow) -> dict[str, Any]:
    return {
        "dataset": row.name,
        "run": one.run.name,
        "step": made.step,
        "content_hash": made.content_hash,
        "folder": made.uri,
        "is_there": Path(made.uri).exists(),
        "promoted": made.promoted,
    }


def _indexes(folders: Iterable[str], fingerprint: str, checkpoints: set[str]) -> Iterator[str]:
    """Vectors of this set by any model, and of any set by the models that were trained on it."""
    for folder in folders:
        for place in Path(folder).glob("embeddings/*.zarr"):
            checkpoint, _, rest = place.name.partition("-")
            if rest.startswith(fingerprint) or checkpoint in checkpoints:
                yield str(place)


def _named(row: DatasetRow) -> dict[str, Any]:
    when = row.superseded_at
    return {
        "name": row.name,
        "fingerprint": row.fingerprint,
        "folder": row.source_uri,
        "registered_at": row.created_at.isoformat(timespec="seconds"),
        "superseded_at": when.isoformat(timespec="seconds") if when else None,
    }


def _relative(one: Relative) -> dict[str, Any]:
    return {
        **_named(one.dataset),
        "steps": one.steps,
        "relation": one.relation,
        "details": dict(one.details),
    }


def lineage_tables(found: Mapping[str, Any]) -> list[Table]:
    """The lineage as tables; those without rows are left out."""
    dataset = found["dataset"]
    made = [table(f"data set {dataset['name']}", ("", ""), list(dataset.items()))]
    for title, kind in (("made from", "parents"), ("made from it", "children")):
        rows = [
            (one["steps"], one["relation"], one["name"], one["fingerprint"][:16], one["folder"])
            for one in found[kind]
        ]
        if rows:
            made.append(table(title, ("steps", "by", "data set", "fingerprint", "folder"), rows))
    return made + trained_tables(found)


def trained_tables(found: Mapping[str, Any]) -> list[Table]:
    """What was trained on the set, or made of its items by a model."""
    made = []
    for title, columns, values in (
        ("trained runs", _RUN_COLUMNS, found["runs"]),
        ("trained checkpoints", _CHECKPOINT_COLUMNS, found["checkpoints"]),
    ):
        heads = [name.replace("_", " ") for name in columns]
        rows = [[one[name] for name in columns] for one in values]
        if rows:
            made.append(table(title, heads, rows))
    if found["indexes"]:
        made.append(table("indexes", ("folder",), [(one,) for one in found["indexes"]]))
    return made

"""From a checkpoint back to the bytes it was trained on, by content hashes.

checkpoint -> run (config hash, git commit) -> data set (fingerprint) -> shards (SHA-256), and the
data sets that this one was made from.
Reads only. Left out: checking the hashes against the files, which opening them does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import (
    CheckpointRow,
    DatasetLinkRow,
    DatasetRow,
    EvaluationRow,
    TrainingRunRow,
)

MIN_PREFIX = 6


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of a data set as it was when the run started."""

    split: str
    file: str
    sha256: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A data set that another was made from, in so many steps."""

    steps: int
    relation: str
    dataset: DatasetRow


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a checkpoint comes from. Rows are detached: they can be read, not written."""

    checkpoint: CheckpointRow
    evaluations: Sequence[EvaluationRow]
    run: TrainingRunRow
    dataset: DatasetRow | None
    shards: Sequence[Shard]
    ancestors: Sequence[Ancestor] = ()


def trace(registry: Registry, checkpoint: str) -> Lineage:
    """Follows a checkpoint, given by its content hash, the hash's first digits or its folder.

    A folder means the checkpoint that was put there last: that of a run trained anew has the same.

    Raises:
        RegistryError: no checkpoint, or several, answer to it.
    """
    with registry.reading() as session:
        found = list(session.scalars(_matching(checkpoint)))
        found = [row for row in found if row.uri == _folder(checkpoint)][-1:] or found
        if not found:
            raise RegistryError(
                f"no checkpoint '{checkpoint}' is registered: give its folder or at least the "
                f"first {MIN_PREFIX} digits of its content hash"
            )
        if len({row.content_hash for row in found}) > 1:
            raise RegistryError(f"several checkpoints begin with '{checkpoint}': give more digits")
        row = found[-1]
        run = session.get_one(TrainingRunRow, row.training_run_id)
        dataset = session.get(DatasetRow, run.dataset_id) if run.dataset_id else None
        evaluations = session.scalars(
            select(EvaluationRow)
            .where(EvaluationRow.checkpoint_id == row.id)
            .order_by(EvaluationRow.suite_name)
        ).all()
        ancestors = ancestors_of(session, dataset.id) if dataset else ()
        session.expunge_all()
    return Lineage(
        checkpoint=row,
        evaluations=evaluations,
        run=run,
        dataset=dataset,
        shards=shards_of(dataset.details) if dataset else (),
        ancestors=ancestors,
    )


def ancestors_of(session: Session, dataset_id: int) -> Sequence[Ancestor]:
    """The data sets that one was made from, and those from which these were, nearest first."""
    found: list[Ancestor] = []
    seen, current = {dataset_id}, [dataset_id]
    while current:
        links = session.scalars(
            select(DatasetLinkRow)
            .where(DatasetLinkRow.dataset_id.in_(current))
            .order_by(DatasetLinkRow.id)
        ).all()
        steps = found[-1].steps + 1 if found else 1
        current = []
        for link in links:
            if link.parent_id not in seen:
                seen.add(link.parent_id)
                current.append(link.parent_id)
                parent = session.get_one(DatasetRow, link.parent_id)
                found.append(Ancestor(steps=steps, relation=link.relation, dataset=parent))
    return found


def shards_of(details: dict[str, Any]) -> tuple[Shard, ...]:
    """The shards that a data set's row lists."""
    return tuple(
        Shard(
            split=split,
            file=shard["file"],
            sha256=shard["sha256"],
            num_samples=shard["num_samples"],
        )
        for split, files in details["splits"].items()
        for shard in files["shards"]
    )


def _folder(checkpoint: str) -> str:
    return str(Path(checkpoint).absolute())


def _matching(checkpoint: str) -> Select[CheckpointRow]:
    by_folder = CheckpointRow.uri == _folder(checkpoint)
    is_hash = len(checkpoint) >= MIN_PREFIX and set(checkpoint) <= set("0123456789abcdef")
    if is_hash:
        by_hash = CheckpointRow.content_hash.startswith(checkpoint, autoescape=True)
        return select(CheckpointRow).where(or_(by_folder, by_hash)).order_by(CheckpointRow.id)
    return select(CheckpointRow).where(by_folder).order_by(CheckpointRow.id)

"""From a checkpoint back to the bytes it was trained on, by content hashes.

checkpoint -> run (config hash, git commit) -> data sets (fingerprint) -> shards (SHA-256), and the
data sets that each was made from.
Reads only. Left out: checking the hashes against the files, which opening them does.
"""

from collections.abc import Mapping, Sequence
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
    RunDatasetRow,
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
class Relative:
    """A data set that another was made from, or that was made from it, in so many steps."""

    steps: int
    relation: str
    dataset: DatasetRow
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReadSet:
    """A data set that a run reads, and those that it was made from, nearest first."""

    link: RunDatasetRow
    dataset: DatasetRow
    ancestors: Sequence[Relative]

    @property
    def shards(self) -> tuple[Shard, ...]:
        return shards_of(self.dataset.details)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a checkpoint comes from. Rows are detached: they can be read, not written."""

    checkpoint: CheckpointRow
    evaluations: Sequence[EvaluationRow]
    run: TrainingRunRow
    datasets: Sequence[ReadSet]


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
        datasets = sets_of(session, run.id)
        evaluations = session.scalars(
            select(EvaluationRow)
            .where(EvaluationRow.checkpoint_id == row.id)
            .order_by(EvaluationRow.suite_name)
        ).all()
        session.expunge_all()
    return Lineage(checkpoint=row, evaluations=evaluations, run=run, datasets=datasets)


def sets_of(session: Session, run_id: int) -> list[ReadSet]:
    """The data sets that a run reads, in the order of its mixture."""
    found = session.execute(
        select(RunDatasetRow, DatasetRow)
        .join(DatasetRow, RunDatasetRow.dataset_id == DatasetRow.id)
        .where(RunDatasetRow.training_run_id == run_id)
        .order_by(RunDatasetRow.id)
    ).all()
    return [
        ReadSet(link=link, dataset=row, ancestors=ancestors_of(session, row.id))
        for link, row in found
    ]


def ancestors_of(session: Session, dataset_id: int) -> list[Relative]:
    """The data sets that one was made from, and those from which these were, nearest first."""
    return _relatives(session, dataset_id, upwards=True)


def descendants_of(session: Session, dataset_id: int) -> list[Relative]:
    """The data sets that were made from one, and from these, nearest first."""
    return _relatives(session, dataset_id, upwards=False)


def _relatives(session: Session, dataset_id: int, *, upwards: bool) -> list[Relative]:
    found: list[Relative] = []
    here, there = DatasetLinkRow.dataset_id, DatasetLinkRow.parent_id
    if not upwards:
        here, there = there, here
    seen, current, steps = {dataset_id}, [dataset_id], 0
    while current:
        links = session.execute(
            select(DatasetLinkRow, DatasetRow)
            .join(DatasetRow, DatasetRow.id == there)
            .where(here.in_(current))
            .order_by(DatasetLinkRow.id)
        ).all()
        steps, current = steps + 1, []
        for link, row in links:
            if row.id not in seen:
                seen.add(row.id)
                current.append(row.id)
                relative = Relative(
                    steps=steps, relation=link.relation, dataset=row, details=link.details
                )
                found.append(relative)
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

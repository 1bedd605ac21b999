"""From a checkpoint back to the bytes it was trained on, by content hashes.

checkpoint -> run (config hash, git commit) -> data set (fingerprint) -> shards (SHA-256).
Reads only. Left out: checking the hashes against the files, which opening them does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Select, or_, select

from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import (
    CheckpointRow,
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
class Lineage:
    """Where a checkpoint comes from. Rows are detached: they can be read, not written."""

    checkpoint: CheckpointRow
    evaluations: Sequence[EvaluationRow]
    run: TrainingRunRow
    dataset: DatasetRow | None
    shards: Sequence[Shard]


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
        session.expunge_all()
    return Lineage(
        checkpoint=row,
        evaluations=evaluations,
        run=run,
        dataset=dataset,
        shards=shards_of(dataset.details) if dataset else (),
    )


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

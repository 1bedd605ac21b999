"""A data set in the registry: found by folder or fingerprint, what was trained on it, its end.

A set is superseded when items were erased from it. Its row stays, since runs and checkpoints point
at it; rows of the erased items, which hold their captions, go.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from carillon.engine.registry.database import RegistryError
from carillon.engine.registry.lineage import MIN_PREFIX
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import (
    CheckpointRow,
    DataItemRow,
    DatasetRow,
    RunDatasetRow,
    TrainingRunRow,
    utc_now,
)

_BATCH_ROWS = 500


class Trained(NamedTuple):
    """A run that reads a data set, as what, and its checkpoints."""

    run: TrainingRunRow
    link: RunDatasetRow
    checkpoints: Sequence[CheckpointRow]


def find_dataset(session: Session, given: str) -> DatasetRow:
    """The row of a data set by its fingerprint, the fingerprint's first digits or its folder.

    Of several versions that stood in one folder the one that was registered last is meant.
    Raises RegistryError when none, or several, answer to it.
    """
    by_folder = DatasetRow.source_uri == str(Path(given).absolute())
    is_hash = len(given) >= MIN_PREFIX and set(given) <= set("0123456789abcdef")
    by_hash = DatasetRow.fingerprint.startswith(given, autoescape=True)
    condition = or_(by_folder, by_hash) if is_hash else by_folder
    rows = session.scalars(select(DatasetRow).where(condition).order_by(DatasetRow.id)).all()
    in_folder = [row for row in rows if row.source_uri == str(Path(given).absolute())]
    found = in_folder[-1:] or rows
    if not found:
        raise RegistryError(
            f"no data set '{given}' is registered: give its folder or at least the first "
            f"{MIN_PREFIX} digits of its fingerprint; `carillon data register` enters one"
        )
    if len(found) > 1:
        raise RegistryError(f"several data sets begin with '{given}': give more digits")
    return found[0]


def trained_on(session: Session, dataset_id: int) -> list[Trained]:
    """The runs that read a data set, the oldest first."""
    found = session.execute(
        select(TrainingRunRow, RunDatasetRow)
        .join(RunDatasetRow, RunDatasetRow.training_run_id == TrainingRunRow.id)
        .where(RunDatasetRow.dataset_id == dataset_id)
        .order_by(TrainingRunRow.id, RunDatasetRow.id)
    ).all()
    checkpoints: dict[int, list[CheckpointRow]] = {run.id: [] for run, _ in found}
    for row in session.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.training_run_id.in_(checkpoints))
        .order_by(CheckpointRow.step)
    ):
        checkpoints[row.training_run_id].append(row)
    return [Trained(run, link, checkpoints[run.id]) for run, link in found]


def supersede(registry: Registry, fingerprint: str, uris: Iterable[str]) -> int:
    """Marks a data set as superseded and removes the rows of its items `uris` (split/key).

    Returns how many rows of items were removed. Repeating it keeps the first time.
    """
    removed, rest = 0, iter(uris)
    with registry.writing() as session:
        row = session.scalars(select(DatasetRow).where(DatasetRow.fingerprint == fingerprint)).one()
        row.superseded_at = row.superseded_at or utc_now()
        while batch := list(islice(rest, _BATCH_ROWS)):
            gone = session.scalars(
                delete(DataItemRow)
                .where(DataItemRow.dataset_id == row.id)
                .where(DataItemRow.uri.in_(batch))
                .returning(DataItemRow.id)
            ).all()
            removed += len(gone)
    return removed


def superseded(registry: Registry, fingerprints: Iterable[str]) -> list[DatasetRow]:
    """Those of the data sets that are superseded; detached rows."""
    with registry.reading() as session:
        rows = session.scalars(
            select(DatasetRow)
            .where(DatasetRow.fingerprint.in_(list(fingerprints)))
            .where(DatasetRow.superseded_at.is_not(None))
        ).all()
        session.expunge_all()
    return list(rows)

"""Writes and finds the rows of the lineage: data sets, runs, checkpoints, evaluations.

Every call is one durable transaction and can be repeated: a resumed run finds its row, a step saved
again replaces its checkpoint's row, a suite run again replaces its result. Only rank 0 writes.
Shards, with their SHA-256, are part of a data set's row; one row per item is written on request
only (items.py), since a set may have a billion.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from carillon.engine.data.manifest import VERSION
from carillon.engine.data.shards import Dataset
from carillon.engine.registry.database import (
    LOCK_TIMEOUT_S,
    RegistryError,
    explained,
    open_database,
)
from carillon.engine.registry.tables import (
    RUN_STATUSES,
    CheckpointRow,
    DatasetLinkRow,
    DatasetRow,
    EvaluationRow,
    RunDatasetRow,
    TrainingRunRow,
    utc_now,
)


class RunDataset(NamedTuple):
    """A data set that a run reads, by its fingerprint; `name` is that in the mixture, if any."""

    fingerprint: str
    name: str = ""
    split: str | None = None
    from_position: int = 0


class Registry:
    """The rows of one database. Safe to use from several threads and after a fork."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        create: bool = True,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> "Registry":
        """Opens a SQLite file or a PostgreSQL URL and brings its schema up to date.

        Raises:
            RegistryError: see database.open_database.
        """
        return cls(open_database(location, create=create, lock_timeout_s=lock_timeout_s))

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that commits at its end, or leaves nothing; raises RegistryError."""
        with explained(self._engine.url), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads and waits for no writer; raises RegistryError."""
        engine = self._engine.execution_options(carillon_reads=True)
        with explained(self._engine.url), Session(engine) as session:
            yield session

    def record_dataset(self, dataset: Dataset, *, modality: str = "image-text") -> int:
        """Makes sure of the data set's row, found by its fingerprint; returns its id.

        Where the manifest names sets that it was made from, and these have rows, they are linked.
        """
        manifest = dataset.manifest
        splits = {name: asdict(split) for name, split in manifest.splits.items()}
        with self.writing() as session:
            row = session.scalar(
                select(DatasetRow).where(DatasetRow.fingerprint == dataset.fingerprint)
            )
            if row is None:
                row = DatasetRow(fingerprint=dataset.fingerprint, modality=modality)
                session.add(row)
            row.name, row.version = dataset.name, str(VERSION)
            row.source_uri = dataset.place
            row.details = storable({"splits": splits, "source": dict(manifest.source)})
            session.flush()
            _link_parents(session, row.id, manifest.source)
            return row.id

    def record_derived(
        self,
        dataset: Dataset,
        parents: Sequence[Dataset],
        *,
        relation: str,
        details: Mapping[str, Any],
    ) -> int:
        """Makes sure of a data set's row, of its parents' and of the links; returns its id."""
        parent_ids = [self.record_dataset(parent) for parent in parents]
        dataset_id = self.record_dataset(dataset)
        with self.writing() as session:
            for parent_id in parent_ids:
                row = session.scalar(
                    select(DatasetLinkRow)
                    .where(DatasetLinkRow.dataset_id == dataset_id)
                    .where(DatasetLinkRow.parent_id == parent_id)
                )
                if row is None:
                    row = DatasetLinkRow(dataset_id=dataset_id, parent_id=parent_id)
                    session.add(row)
                row.relation, row.details = relation, storable(details)
        return dataset_id

    def start_run(
        self,
        name: str,
        *,
        config_hash: str,
        params: Mapping[str, Any],
        artifacts_uri: str | Path,
        datasets: Sequence[RunDataset] = (),
        git_commit: str | None = None,
        logs_uri: str | None = None,
        fresh: bool = False,
    ) -> int:
        """Marks the run in the folder `artifacts_uri` as running; returns its id.

        A run of the same config in the same folder goes on in its row; with `fresh`, or under
        another config, that row becomes superseded and a new one begins.

        Raises:
            RegistryError: no data set has such a fingerprint: record_dataset comes first.
        """
        folder = str(Path(artifacts_uri).absolute())
        with self.writing() as session:
            dataset_ids = [_dataset_id(session, one.fingerprint) for one in datasets]
            row = session.scalar(
                select(TrainingRunRow)
                .where(TrainingRunRow.artifacts_uri == folder)
                .where(TrainingRunRow.status != "superseded")
            )
            if row is not None and (fresh or row.config_hash != config_hash):
                row.status = "superseded"
                session.flush()
                row = None
            if row is None:
                row = TrainingRunRow(artifacts_uri=folder, config_hash=config_hash)
                session.add(row)
            row.name, row.params, row.logs_uri = name, storable(params), logs_uri
            row.git_commit = git_commit
            row.status, row.end_time = "running", None
            session.flush()
            _link(session, row.id, datasets, dataset_ids)
            return row.id

    def update_run(self, run_id: int, step: int, metrics: Mapping[str, Any]) -> None:
        """Records how far a run is; metrics are merged with those recorded before."""
        with self.writing() as session:
            row = _run(session, run_id)
            row.step = step
            row.metrics = {**row.metrics, **storable(metrics)}

    def finish_run(self, run_id: int, status: str) -> None:
        """Records a run's end: 'finished', 'failed' or 'interrupted'.

        Raises:
            ValueError: another status.
        """
        if status not in RUN_STATUSES[1:4]:
            raise ValueError(f"a run ends {', '.join(RUN_STATUSES[1:4])}; got '{status}'")
        with self.writing() as session:
            row = _run(session, run_id)
            row.status, row.end_time = status, utc_now()

    def add_checkpoint(
        self,
        run_id: int,
        step: int,
        *,
        uri: str | Path,
        content_hash: str,
        val_metrics: Mapping[str, Any] | None = None,
    ) -> int:
        """Records a complete checkpoint, and the run's step; returns the checkpoint's id.

        The same step with other bytes replaces the row and drops its evaluations.
        """
        with self.writing() as session:
            row = session.scalar(
                select(CheckpointRow)
                .where(CheckpointRow.training_run_id == run_id)
                .where(CheckpointRow.step == step)
            )
            if row is not None and row.content_hash != content_hash:
                session.delete(row)
                session.flush()
                row = None
            if row is None:
                row = CheckpointRow(training_run_id=run_id, step=step, content_hash=content_hash)
                row.val_metrics = {}
                session.add(row)
            row.uri = str(Path(uri).absolute())
            row.val_metrics = {**row.val_metrics, **storable(val_metrics or {})}
            _run(session, run_id).step = step
            session.flush()
            return row.id

    def add_evaluation(self, content_hash: str, suite_name: str, metrics: Mapping[str, Any]) -> int:
        """Records a suite's result on the checkpoint of this content hash; returns its id.

        Raises:
            RegistryError: the checkpoint is not recorded here.
        """
        with self.writing() as session:
            checkpoint_id = session.scalar(
                select(CheckpointRow.id)
                .where(CheckpointRow.content_hash == content_hash)
                .order_by(CheckpointRow.id.desc())
            )
            if checkpoint_id is None:
                raise RegistryError(
                    f"no checkpoint {content_hash[:12]} is registered: was the run trained with "
                    "another registry?"
                )
            row = session.scalar(
                select(EvaluationRow)
                .where(EvaluationRow.checkpoint_id == checkpoint_id)
                .where(EvaluationRow.suite_name == suite_name)
            )
            if row is None:
                row = EvaluationRow(checkpoint_id=checkpoint_id, suite_name=suite_name)
                session.add(row)
            row.metrics, row.created_at = storable(metrics), utc_now()
            session.flush()
            return row.id


def storable(value: Any) -> Any:
    """A copy that JSON can hold: NaN and infinities, which it cannot, become null."""
    if hasattr(value, "item"):  # a number of NumPy or torch, neither of which is imported here
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.replace("\0", "\\0")  # PostgreSQL's JSONB refuses NUL
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _link_parents(session: Session, dataset_id: int, source: Mapping[str, Any]) -> None:
    """Links that are missing, as after a kill between a set and its rows."""
    parents = source.get("parents")
    named = [
        one.get("fingerprint")
        for one in (parents if isinstance(parents, list) else ())
        if isinstance(one, Mapping)
    ]
    known = select(DatasetRow.id).where(
        DatasetRow.fingerprint.in_([one for one in named if isinstance(one, str)]),
        DatasetRow.id != dataset_id,
        DatasetRow.id.not_in(
            select(DatasetLinkRow.parent_id).where(DatasetLinkRow.dataset_id == dataset_id)
        ),
    )
    for parent_id in session.scalars(known).all():
        row = DatasetLinkRow(dataset_id=dataset_id, parent_id=parent_id)
        row.relation, row.details = str(source.get("kind", "made from")), {}
        session.add(row)


def _link(
    session: Session, run_id: int, datasets: Sequence[RunDataset], dataset_ids: Sequence[int]
) -> None:
    """The run's data sets; those of an earlier start of the same run are replaced."""
    session.execute(delete(RunDatasetRow).where(RunDatasetRow.training_run_id == run_id))
    for one, dataset_id in zip(datasets, dataset_ids, strict=True):
        session.add(
            RunDatasetRow(
                training_run_id=run_id,
                dataset_id=dataset_id,
                name=one.name,
                split=one.split,
                from_position=one.from_position,
            )
        )


def _dataset_id(session: Session, fingerprint: str) -> int:
    found = session.scalar(select(DatasetRow.id).where(DatasetRow.fingerprint == fingerprint))
    if found is None:
        raise RegistryError(f"no data set {fingerprint[:12]} is registered: record it first")
    return found


def _run(session: Session, run_id: int) -> TrainingRunRow:
    row = session.get(TrainingRunRow, run_id)
    if row is None:
        raise RegistryError(f"run {run_id} is not in the registry")
    return row

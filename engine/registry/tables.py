"""The SQL tables of the lineage: data sets, their links and items, runs, checkpoints, evaluations.

Portable between SQLite and PostgreSQL: JSON is JSONB there, times are UTC in both. Rows point at
each other by id, and carry the content hashes (fingerprint, config_hash, content_hash) by which
they are found again from the bytes. `project_id` is null until projects exist.
A change here needs a migration in migrations/versions; a test compares the two.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# A run is superseded when it is started anew (--fresh) in the same folder.
RUN_STATUSES = ("running", "finished", "failed", "interrupted", "superseded")

VERSION_TABLE = "carillon_schema_version"  # Alembic's usual name may be another program's

Identity = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up INTEGER keys only
Json = JSON().with_variant(JSONB(), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone: SQLite drops the zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can name it too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        str: String(),
    }


class DatasetRow(Base):
    """A data set of one fingerprint; its shards with their SHA-256 stand in `metadata`."""

    __tablename__ = "datasets"

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    project_id: Mapped[int | None] = mapped_column(BigInteger())
    name: Mapped[str] = mapped_column(index=True)
    modality: Mapped[str]
    version: Mapped[str]
    # Set when items were erased from it: it is not to be used any more, the links say what is.
    superseded_at: Mapped[datetime | None]
    source_uri: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    details: Mapped[dict[str, Any]] = mapped_column("metadata", Json)  # the name is SQLAlchemy's
    fingerprint: Mapped[str] = mapped_column(unique=True)


class DatasetLinkRow(Base):
    """A data set was made from another: `relation` says how, such as `curate`."""

    __tablename__ = "dataset_links"
    __table_args__ = (UniqueConstraint("dataset_id", "parent_id"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    parent_id: Mapped[int] = mapped_column(ForeignKey("datasets.id"))
    relation: Mapped[str]
    details: Mapped[dict[str, Any]]


class DataItemRow(Base):
    """One sample of a data set; `uri` is split/key, `checksum` the SHA-256 of its media bytes."""

    __tablename__ = "data_items"
    __table_args__ = (UniqueConstraint("dataset_id", "uri"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    uri: Mapped[str]
    modality: Mapped[str]
    language: Mapped[str | None]
    checksum: Mapped[str] = mapped_column(index=True)
    quality_score: Mapped[float | None] = mapped_column(Double())
    nsfw_flag: Mapped[bool | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    meta: Mapped[dict[str, Any]]


class TrainingRunRow(Base):
    """One run; `artifacts_uri` is its folder, which holds one run that is not superseded."""

    __tablename__ = "training_runs"
    __table_args__ = (
        CheckConstraint(f"status IN {RUN_STATUSES}", name="status"),
        Index(
            "uq_training_runs_current",
            "artifacts_uri",
            unique=True,
            sqlite_where=text("status <> 'superseded'"),
            postgresql_where=text("status <> 'superseded'"),
        ),
    )

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    project_id: Mapped[int | None] = mapped_column(BigInteger())
    config_hash: Mapped[str] = mapped_column(index=True)
    params: Mapped[dict[str, Any]]
    status: Mapped[str]
    start_time: Mapped[datetime] = mapped_column(default=utc_now)
    end_time: Mapped[datetime | None]
    artifacts_uri: Mapped[str]
    logs_uri: Mapped[str | None]
    name: Mapped[str] = mapped_column(index=True)
    git_commit: Mapped[str | None]
    step: Mapped[int] = mapped_column(BigInteger(), default=0)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)


class RunDatasetRow(Base):
    """A data set that a run reads; `name` is that in its mixture, empty where it reads one alone.

    `from_position` is the global position at which the set joined. `split` is null where the run
    was recorded before there were mixtures.
    """

    __tablename__ = "run_datasets"
    __table_args__ = (UniqueConstraint("training_run_id", "name"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    training_run_id: Mapped[int] = mapped_column(ForeignKey("training_runs.id", ondelete="CASCADE"))
    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id"), index=True)
    name: Mapped[str]
    split: Mapped[str | None]
    from_position: Mapped[int] = mapped_column(BigInteger(), default=0)


class CheckpointRow(Base):
    """One complete checkpoint; `content_hash` is the SHA-256 of its manifest.

    The row outlives the files, which the trainer removes by keep_last and keep_best.
    """

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("training_run_id", "step"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    training_run_id: Mapped[int] = mapped_column(ForeignKey("training_runs.id", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(BigInteger())
    val_metrics: Mapped[dict[str, Any]]
    uri: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    promoted: Mapped[bool] = mapped_column(default=False)
    content_hash: Mapped[str] = mapped_column(index=True)


class EvaluationRow(Base):
    """The newest result of one suite on one checkpoint."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("checkpoint_id", "suite_name"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id", ondelete="CASCADE"))
    suite_name: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)

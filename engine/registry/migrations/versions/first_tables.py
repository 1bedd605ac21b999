"""datasets, data_items, training_runs, checkpoints and evaluations.

Frozen: it creates the tables as they were at this revision, whatever tables.py says later.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

_identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_json = sa.JSON().with_variant(JSONB(), "postgresql")
_time = sa.DateTime(timezone=True)


def upgrade() -> None:
    _create_datasets()
    _create_data_items()
    _create_training_runs()
    _create_checkpoints()
    _create_evaluations()


def downgrade() -> None:
    for table in ("evaluations", "checkpoints", "training_runs", "data_items", "datasets"):
        op.drop_table(table)


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", _identity, nullable=False),
        sa.Column("project_id", sa.BigInteger()),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("modality", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("source_uri", sa.String(), nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("metadata", _json, nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
        sa.UniqueConstraint("fingerprint", name="uq_datasets_fingerprint"),
    )
    op.create_index("ix_datasets_name", "datasets", ["name"])


def _create_data_items() -> None:
    op.create_table(
        "data_items",
        sa.Column("id", _identity, nullable=False),
        sa.Column("dataset_id", _identity, nullable=False),
        sa.Column("uri", sa.String(), nullable=False),
        sa.Column("modality", sa.String(), nullable=False),
        sa.Column("language", sa.String()),
        sa.Column("checksum", sa.String(), nullable=False),
        sa.Column("quality_score", sa.Double()),
        sa.Column("nsfw_flag", sa.Boolean()),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("meta", _json, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_data_items"),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name="fk_data_items_dataset_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("dataset_id", "uri", name="uq_data_items_dataset_id_uri"),
    )
    op.create_index("ix_data_items_checksum", "data_items", ["checksum"])


def _create_training_runs() -> None:
    op.create_table(
        "training_runs",
        sa.Column("id", _identity, nullable=False),
        sa.Column("project_id", sa.BigInteger()),
        sa.Column("config_hash", sa.String(), nullable=False),
        sa.Column("params", _json, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("start_time", _time, nullable=False),
        sa.Column("end_time", _time),
        sa.Column("artifacts_uri", sa.String(), nullable=False),
        sa.Column("logs_uri", sa.String()),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("dataset_id", _identity),
        sa.Column("git_commit", sa.String()),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("metrics", _json, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_training_runs"),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name="fk_training_runs_dataset_id"
        ),
        sa.CheckConstraint(
            "status IN ('running', 'finished', 'failed', 'interrupted', 'superseded')",
            name="ck_training_runs_status",
        ),
    )
    current = sa.text("status <> 'superseded'")
    op.create_index(
        "uq_training_runs_current",
        "training_runs",
        ["artifacts_uri"],
        unique=True,
        sqlite_where=current,
        postgresql_where=current,
    )
    op.create_index("ix_training_runs_config_hash", "training_runs", ["config_hash"])
    op.create_index("ix_training_runs_name", "training_runs", ["name"])


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", _identity, nullable=False),
        sa.Column("training_run_id", _identity, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("val_metrics", _json, nullable=False),
        sa.Column("uri", sa.String(), nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("promoted", sa.Boolean(), nullable=False),
        sa.Column("content_hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.ForeignKeyConstraint(
            ["training_run_id"],
            ["training_runs.id"],
            name="fk_checkpoints_training_run_id",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint("training_run_id", "step", name="uq_checkpoints_training_run_id_step"),
    )
    op.create_index("ix_checkpoints_content_hash", "checkpoints", ["content_hash"])


def _create_evaluations() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", _identity, nullable=False),
        sa.Column("checkpoint_id", _identity, nullable=False),
        sa.Column("suite_name", sa.String(), nullable=False),
        sa.Column("metrics", _json, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name="fk_evaluations_checkpoint_id",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint(
            "checkpoint_id", "suite_name", name="uq_evaluations_checkpoint_id_suite_name"
        ),
    )

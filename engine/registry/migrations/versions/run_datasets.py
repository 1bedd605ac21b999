"""run_datasets: all the data sets of a run, in place of the one that training_runs pointed at.

Old rows are carried over: their set becomes the only one, whose split nobody wrote down. And
datasets.superseded_at. Frozen: it makes the tables as they were at this revision.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "run_datasets",
        sa.Column("id", _identity, nullable=False),
        sa.Column("training_run_id", _identity, nullable=False),
        sa.Column("dataset_id", _identity, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("split", sa.String()),
        sa.Column("from_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_run_datasets"),
        sa.UniqueConstraint("training_run_id", "name", name="uq_run_datasets_training_run_id_name"),
        sa.ForeignKeyConstraint(
            ["training_run_id"],
            ["training_runs.id"],
            name="fk_run_datasets_training_run_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name="fk_run_datasets_dataset_id"),
    )
    op.create_index("ix_run_datasets_dataset_id", "run_datasets", ["dataset_id"])
    op.execute(
        "INSERT INTO run_datasets (training_run_id, dataset_id, name, from_position) "
        "SELECT id, dataset_id, '', 0 FROM training_runs WHERE dataset_id IS NOT NULL ORDER BY id"
    )
    # SQLite makes the table anew for this, as it drops no column that is a foreign key.
    with op.batch_alter_table("training_runs") as table:
        table.drop_constraint("fk_training_runs_dataset_id", type_="foreignkey")
        table.drop_column("dataset_id")
    op.add_column("datasets", sa.Column("superseded_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    """Of a mixture only one set can be kept."""
    op.drop_column("datasets", "superseded_at")
    with op.batch_alter_table("training_runs") as table:
        table.add_column(sa.Column("dataset_id", _identity))
        table.create_foreign_key("fk_training_runs_dataset_id", "datasets", ["dataset_id"], ["id"])
    op.execute(
        "UPDATE training_runs SET dataset_id = (SELECT min(dataset_id) FROM run_datasets "
        "WHERE training_run_id = training_runs.id)"
    )
    op.drop_table("run_datasets")

"""dataset_links: which data sets another was made from.

Frozen: it creates the table as it was at this revision, whatever tables.py says later.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

_identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "dataset_links",
        sa.Column("id", _identity, nullable=False),
        sa.Column("dataset_id", _identity, nullable=False),
        sa.Column("parent_id", _identity, nullable=False),
        sa.Column("relation", sa.String(), nullable=False),
        sa.Column("details", _json, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dataset_links"),
        sa.UniqueConstraint(
            "dataset_id", "parent_id", name="uq_dataset_links_dataset_id_parent_id"
        ),
        sa.ForeignKeyConstraint(
            ["dataset_id"],
            ["datasets.id"],
            name="fk_dataset_links_dataset_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["parent_id"], ["datasets.id"], name="fk_dataset_links_parent_id"),
    )


def downgrade() -> None:
    op.drop_table("dataset_links")

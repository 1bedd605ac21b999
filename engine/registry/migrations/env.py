"""Alembic runs this file for every command; the connection comes from upgrade.py."""

from alembic import context

from carillon.engine.registry.tables import VERSION_TABLE, Base

# One transaction around everything: SQLite's DDL is transactional once the driver begins nothing.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

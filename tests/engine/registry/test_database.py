"""Opening the registry: the schema it ends with, and a clear message for what cannot be opened."""

import io
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine, event, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateIndex, CreateTable

from carillon.engine.config import UserError
from carillon.engine.registry.database import (
    NEWEST_REVISION,
    RegistryError,
    open_database,
    parse_location,
    reading,
)
from carillon.engine.registry.migrations.upgrade import known_revisions, upgrade
from carillon.engine.registry.migrations.versions import dataset_links, first_tables, run_datasets
from carillon.engine.registry.store import Registry
from carillon.engine.registry.tables import (
    VERSION_TABLE,
    Base,
    CheckpointRow,
    DataItemRow,
    DatasetLinkRow,
    EvaluationRow,
    RunDatasetRow,
    TrainingRunRow,
)

# prd.md's tables and columns, by which other programs may read the database.
COLUMNS = {
    "datasets": "id project_id name modality version source_uri created_at metadata",
    "data_items": (
        "id dataset_id uri modality language checksum quality_score nsfw_flag created_at meta"
    ),
    "training_runs": (
        "id project_id config_hash params status start_time end_time artifacts_uri logs_uri"
    ),
    "checkpoints": "id training_run_id step val_metrics uri created_at promoted",
    "evaluations": "id checkpoint_id suite_name metrics created_at",
}


def test_migrated_schema_equals_the_model(location: Path) -> None:
    engine = open_database(location)
    options = {"version_table": VERSION_TABLE, "compare_type": True}
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_newest_migration_is_the_expected_revision() -> None:
    assert NEWEST_REVISION in known_revisions()
    assert max(known_revisions()) == NEWEST_REVISION


@pytest.mark.parametrize("table", COLUMNS)
def test_columns_have_the_published_names(location: Path, table: str) -> None:
    open_database(location)
    connection = sqlite3.connect(location)
    found = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    connection.close()
    assert set(COLUMNS[table].split()) <= found


def test_sqlite_keeps_a_write_ahead_log_and_enforces_keys_and_statuses(location: Path) -> None:
    engine = open_database(location)
    with reading(engine) as connection:
        for pragma, value in (("journal_mode", "wal"), ("foreign_keys", 1), ("synchronous", 2)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    registry = Registry(engine)
    with pytest.raises(RegistryError, match="FOREIGN KEY"):
        _insert_link(registry, dataset_id=77)
    with pytest.raises(RegistryError, match="ck_training_runs_status"):
        _insert_run(registry, status="sleeping")


def _insert_run(registry: Registry, *, status: str, params: dict[str, Any] | None = None) -> None:
    with registry.writing() as session:
        row = TrainingRunRow(config_hash="c", params=params or {}, artifacts_uri="/r", name="r")
        row.status = status
        session.add(row)


def _insert_link(registry: Registry, *, dataset_id: int) -> None:
    with registry.writing() as session:
        session.add(DatasetLinkRow(dataset_id=dataset_id, parent_id=1, relation="", details={}))


def test_postgresql_ddl_of_migration_and_model_agree() -> None:
    """Compiled, not run: JSONB, zoned times, the partial index, and the same columns in both."""
    buffer = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": buffer}
    )
    with Operations.context(context):
        first_tables.upgrade()
        dataset_links.upgrade()
        run_datasets.upgrade()
    migrated = _lines(buffer.getvalue())
    statements = {line for line in migrated if line.startswith(("ALTER", "INSERT"))}
    column = "superseded_at TIMESTAMP WITH TIME ZONE"
    assert {
        "ALTER TABLE training_runs DROP CONSTRAINT fk_training_runs_dataset_id",
        "ALTER TABLE training_runs DROP COLUMN dataset_id",
        f"ALTER TABLE datasets ADD COLUMN {column}",
    } < statements
    assert len(statements) == 4
    dropped = {
        "dataset_id BIGINT",
        "CONSTRAINT fk_training_runs_dataset_id FOREIGN KEY(dataset_id) REFERENCES datasets (id)",
    }
    migrated = (migrated - statements - dropped) | {column}
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    modelled = set()
    for table in Base.metadata.sorted_tables:
        modelled |= _lines(str(CreateTable(table).compile(dialect=dialect)))
        for index in table.indexes:
            modelled |= _lines(str(CreateIndex(index).compile(dialect=dialect)))
    assert migrated == modelled
    assert "params JSONB NOT NULL" in migrated
    assert "start_time TIMESTAMP WITH TIME ZONE NOT NULL" in migrated
    assert any("WHERE status <> 'superseded'" in line for line in migrated)


OLD_ROWS = """
INSERT INTO datasets VALUES (3, NULL, 'd', 'image', '2', '/d', '2026-01-01', '{}', 'f');
INSERT INTO data_items VALUES (1, 3, 'train/k', 'image', 'en', 's', NULL, NULL, '2026-01-01', '{}');
INSERT INTO training_runs VALUES
  (5, NULL, 'c', '{}', 'finished', '2026-01-01', NULL, '/r', NULL, 'r', 3, NULL, 9, '{}'),
  (6, NULL, 'c', '{}', 'failed', '2026-01-01', NULL, '/s', NULL, 's', NULL, NULL, 1, '{}');
INSERT INTO checkpoints VALUES (8, 5, 9, '{}', '/r/9', '2026-01-01', FALSE, 'h');
INSERT INTO evaluations VALUES (9, 8, 'suite', '{}', '2026-01-01');
"""


def test_rows_of_the_first_schema_are_carried_over(location: Path) -> None:
    """The run keeps its set; its table is made anew, and what points at it stays."""
    upgrade_to(location, "0001")
    connection = sqlite3.connect(location)
    connection.executescript(OLD_ROWS)
    connection.close()
    registry = Registry.open(location)
    with registry.reading() as session:
        links = session.scalars(select(RunDatasetRow)).all()
        assert [(x.training_run_id, x.dataset_id, x.name, x.split) for x in links] == [
            (5, 3, "", None)
        ]
        assert session.get_one(TrainingRunRow, 5).step == 9
        for table, id in ((DataItemRow, 1), (CheckpointRow, 8), (EvaluationRow, 9)):
            assert session.get(table, id) is not None
    with pytest.raises(RegistryError, match="ck_training_runs_status"):
        _insert_run(registry, status="sleeping")
    with pytest.raises(RegistryError, match="FOREIGN KEY"):
        _insert_link(registry, dataset_id=77)


def upgrade_to(location: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{location}", poolclass=NullPool)
    with engine.begin() as connection:
        upgrade(connection, revision)


def test_rows_that_point_at_none_stop_the_migration(location: Path) -> None:
    upgrade_to(location, "0001")
    connection = sqlite3.connect(location)
    connection.execute("INSERT INTO evaluations VALUES (1, 77, 'suite', '{}', '2026-01-01')")
    connection.commit()
    before = list(connection.iterdump())
    with pytest.raises(RegistryError, match=r"rows that point at none \(evaluations\)"):
        open_database(location)
    assert list(connection.iterdump()) == before
    connection.close()


def _lines(ddl: str) -> set[str]:
    return {line.strip().rstrip(",;") for line in ddl.splitlines() if line.strip()} - {")"}


_OPENER = """
import sys
from carillon.engine.registry.store import Registry
sys.stdin.readline()  # until all have started
Registry.open(sys.argv[1])
"""


def test_processes_that_create_it_at_once_all_succeed(location: Path) -> None:
    command = [sys.executable, "-c", _OPENER, str(location)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    time.sleep(1.5)  # their imports take about this long
    for process in processes:
        process.communicate(b"go\n")
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_a_failed_migration_leaves_nothing(location: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import carillon.engine.registry.migrations.upgrade as migrations

    whole = migrations.upgrade

    def cut_short(connection: object) -> None:
        whole(connection)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "upgrade", cut_short)
    with pytest.raises(KeyboardInterrupt):
        open_database(location)
    monkeypatch.undo()
    connection = sqlite3.connect(location)
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    connection.close()
    open_database(location)


def test_missing_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder: make .*/absent first"):
        open_database(tmp_path / "absent" / "registry.sqlite")


def test_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="is a folder"):
        open_database(tmp_path)


def test_missing_file_when_only_reading(location: Path) -> None:
    with pytest.raises(RegistryError, match="there is no registry"):
        open_database(location, create=False)
    assert not location.exists()


def test_file_that_is_no_database(location: Path) -> None:
    location.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(RegistryError, match="is no SQLite database"):
        open_database(location)


def test_corrupt_pages(location: Path) -> None:
    registry = Registry.open(location)
    content = bytearray(location.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    location.write_bytes(content)
    with pytest.raises(RegistryError, match="is corrupt"):
        _insert_run(registry, status="running")


def test_locked_file_is_waited_for_and_then_named(location: Path) -> None:
    open_database(location)
    other = sqlite3.connect(location, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    registry = Registry.open(location, lock_timeout_s=0.1)  # opening only reads
    with pytest.raises(RegistryError, match="is locked by another process"):
        _insert_run(registry, status="running")
    other.execute("ROLLBACK")
    other.close()
    _insert_run(registry, status="running")


def test_read_only_database(location: Path) -> None:
    open_database(location)
    registry = Registry.open(f"sqlite:///file:{location}?mode=ro&uri=true")
    with pytest.raises(RegistryError, match="is read-only"):
        _insert_run(registry, status="running")


def test_folder_that_cannot_be_written() -> None:
    """/proc refuses new files to everyone, root included."""
    with pytest.raises(RegistryError, match="its folder must exist and be writable"):
        open_database("/proc/registry.sqlite")


def test_full_disk(location: Path) -> None:
    engine = open_database(location)

    @event.listens_for(engine, "connect")
    def forbid_growth(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # means: the present size

    registry = Registry(engine)
    with pytest.raises(RegistryError, match="the disk is full"):
        _insert_run(registry, status="running", params={"x": "y" * 100_000})
    engine = open_database(location)
    _insert_run(Registry(engine), status="running")


def test_newer_schema_is_refused(location: Path) -> None:
    open_database(location)
    connection = sqlite3.connect(location)
    connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(RegistryError, match="schema '9999' of a newer carillon"):
        open_database(location)


def test_tables_of_another_program_are_left_alone(location: Path) -> None:
    connection = sqlite3.connect(location)
    connection.execute("CREATE TABLE datasets (x)")
    connection.close()
    with pytest.raises(RegistryError, match=r"tables of another program \(datasets\)"):
        open_database(location)


@pytest.mark.parametrize("location", ["mysql://host/x", "nonsense://", "sqlite://", ":memory:"])
def test_other_locations_list_what_is_allowed(location: str) -> None:
    with pytest.raises(RegistryError, match=r"give a file, sqlite:///FILE or postgresql"):
        open_database(location)


def test_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(RegistryError) as error:
        open_database("postgresql://user:secret@127.0.0.1:1/x", lock_timeout_s=1)
    assert "user:***@127.0.0.1:1" in str(error.value)
    assert "secret" not in str(error.value)


def test_postgresql_urls_get_the_driver_that_is_installed() -> None:
    assert parse_location("postgresql://u@h/d").drivername == "postgresql+psycopg"

"""Opens the registry's database, a SQLite file or PostgreSQL by URL, at the newest schema.

SQLite runs with a write-ahead log, full syncs, foreign keys and a wait for locks; each transaction
takes the write lock when it begins, so that reading before writing cannot fail halfway. Connections
are not kept between transactions: a run writes a few rows an hour, and its workers fork.
A write-ahead log needs a local file system: give several machines a PostgreSQL URL.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from carillon.engine.config import UserError
from carillon.engine.registry.tables import VERSION_TABLE, Base

LOCK_TIMEOUT_S = 10.0
NEWEST_REVISION = "0003"
_MIGRATION_LOCK = 0x6361726C  # any number that no other program on the server locks by


class RegistryError(UserError):
    """The registry cannot be used; the message names it, says why and what to do."""


def open_database(
    location: str | Path, *, create: bool = True, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> Engine:
    """Returns an engine whose schema is the newest.

    Args:
        location: path of a SQLite file, or a URL: sqlite:///FILE, postgresql+psycopg://...
        create: whether a missing SQLite file is made.

    Raises:
        RegistryError: a URL of another kind, a missing file or folder, a file that is locked,
            read-only, corrupt, or of a newer version, or a server that does not answer.
    """
    url = parse_location(location)
    if url.drivername == "sqlite":
        _check_file(url, create)
    with explained(url):
        engine = _make_engine(url, lock_timeout_s)
        _migrate(engine, url)
    return engine


def parse_location(location: str | Path) -> URL:
    """A SQLAlchemy URL from a path or URL."""
    given = str(location)
    if "://" not in given:
        return URL.create("sqlite", database=given)
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise RegistryError("the registry's URL cannot be read: " + _allowed()) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise RegistryError(f"the registry cannot be '{url.drivername}': {_allowed()}")
    return url


def _allowed() -> str:
    return "give a file, sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"


def _check_file(url: URL, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise RegistryError(f"the registry must be kept: {_allowed()}")
    if url.database.startswith("file:"):
        return  # SQLite's own URI, its parameters are the user's
    path = Path(url.database)
    if path.is_dir():
        raise RegistryError(f"the registry {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise RegistryError(f"the registry {path} has no folder: make {path.parent} first")
    if not create and not path.exists():
        raise RegistryError(f"there is no registry {path}: train a run first, or name another")


def _make_engine(url: URL, lock_timeout_s: float) -> Engine:
    arguments: dict[str, Any] = {"timeout": lock_timeout_s}
    if url.drivername != "sqlite":
        arguments = {"connect_timeout": max(2, round(lock_timeout_s))}
    try:
        engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
    except ModuleNotFoundError as error:
        raise RegistryError(
            f"a PostgreSQL registry needs {error.name}: pip install 'carillon-engine[postgresql]'"
        ) from None
    if url.drivername == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("carillon_reads", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _migrate(engine: Engine, url: URL) -> None:
    """Brings an empty or older schema to the newest; refuses one that is not ours."""
    with reading(engine) as connection:
        if _revision(connection) == NEWEST_REVISION:
            return
    with engine.connect() as connection, _prepared(connection, url).begin():
        if url.drivername != "sqlite":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        revision = _revision(connection)
        if revision == NEWEST_REVISION:
            return  # another process was faster
        from carillon.engine.registry.migrations.upgrade import known_revisions, upgrade

        _check_ours(connection, url, revision, known_revisions())
        upgrade(connection)
        if url.drivername == "sqlite":
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise RegistryError(
                    f"{describe(url)} has rows that point at none ({broken[0][0]}), so it was not "
                    "changed: restore a copy, or move it away to start a new one"
                )


def _prepared(connection: Connection, url: URL) -> Connection:
    """What SQLite sets outside of a transaction only: the log, which the file remembers, and no
    foreign keys on this connection, or a table that is made anew takes the rows that point at it
    along."""
    if url.drivername == "sqlite":
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.execute("PRAGMA journal_mode = WAL")
        driver.execute("PRAGMA foreign_keys = OFF")
    return connection


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(
        text(f"SELECT version_num FROM {VERSION_TABLE}")
    ).scalar()
    return found


def _check_ours(
    connection: Connection, url: URL, revision: str | None, known: frozenset[str]
) -> None:
    if revision is None:
        taken = sorted(set(inspect(connection).get_table_names()) & set(Base.metadata.tables))
        if taken:
            raise RegistryError(
                f"{describe(url)} has tables of another program ({', '.join(taken)}): "
                "name another database"
            )
    elif revision not in known:
        raise RegistryError(
            f"{describe(url)} has the schema '{revision}' of a newer carillon: update carillon"
        )


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that only reads: it waits for no writer."""
    with engine.connect().execution_options(carillon_reads=True) as connection:
        yield connection


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """Turns a database error into one RegistryError that says what to do."""
    try:
        yield
    except DBAPIError as error:
        raise RegistryError(_explanation(url, str(error.orig))) from error
    except SQLAlchemyError as error:
        raise RegistryError(_explanation(url, str(error))) from error


def _explanation(url: URL, message: str) -> str:
    where = describe(url)
    for symptom, meaning in (
        ("locked", f"{where} is locked by another process: wait for it, or stop it"),
        ("readonly", f"{where} is read-only: make the file and its folder writable"),
        (
            "unable to open",
            f"{where} cannot be opened: make it readable; its folder must exist and be writable",
        ),
        ("not a database", f"{where} is no SQLite database: name another file, or move it away"),
        ("malformed", f"{where} is corrupt: restore a copy, or move it away to start a new one"),
        ("disk is full", f"{where} cannot be written, the disk is full: free some space"),
    ):
        if symptom in message:
            return meaning
    return f"{where} failed: {' '.join(message.split())}"


def describe(url: URL) -> str:
    """How messages name the registry: the path, or the URL without its password."""
    if url.drivername == "sqlite":
        return f"the registry {url.database}"
    return f"the registry {url.render_as_string(hide_password=True)}"

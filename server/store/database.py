"""The database under the store: how it is reached, and how its schema is brought up to date."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from server.store.errors import StoreError
from server.store.failures import store_error
from server.store.lock import FolderLock, lock_database

NUM_READERS = 4
FILE_NAME = "headwater.db"
# A server that is not there is given up soon, and so is one that no longer answers (libpq's names).
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}


@dataclass
class Database:
    """One engine that writes and one that reads. `where` names the database for people;
    `patience` is how long, in seconds, to wait for one that went away."""

    where: str
    writing: Engine
    reading: Engine
    patience: float
    address: str | None
    lock: FolderLock | None

    def connect(self) -> Connection:
        """The connection that writes; it holds the lock. Raises StoreLocked, SQLAlchemyError."""
        connection = self.writing.connect()
        if self.lock is None:
            try:
                lock_database(connection, self.where, self.address)
            except BaseException:
                connection.close()
                raise
        return connection

    def close(self) -> None:
        self.reading.dispose()
        self.writing.dispose()
        if self.lock is not None:
            self.lock.release()


def open_database(
    url: str | None, folder: Path, address: str | None
) -> tuple[Database, Connection]:
    """The database at `url`, or the SQLite file in `folder`, locked and with today's schema, and
    the connection that writes to it. Raises StoreError, StoreLocked."""
    database = _sqlite(folder, address) if url is None else _postgresql(url, address)
    try:
        connection = database.connect()
        try:
            _check(connection, database.where)
            _migrate(connection, database.where)
        except BaseException:
            connection.close()
            raise
    except BaseException as error:
        database.close()
        if isinstance(error, SQLAlchemyError | sqlite3.Error):
            remedy = (
                "move the file away, or choose another folder with HEADWATER_DATA"
                if url is None
                else "check its URL, and that it is running"
            )
            raise StoreError(f"{store_error(error, database.where)}; {remedy}") from error
        raise
    return database, connection


def _sqlite(folder: Path, address: str | None) -> Database:
    path = folder / FILE_NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StoreError(
            f"the data folder {folder} cannot be used: {error.filename}: {error.strerror}; choose "
            "another with HEADWATER_DATA"
        ) from None
    lock = FolderLock(folder, address)
    url = URL.create("sqlite", database=str(path))
    writing = create_engine(url, pool_size=1, max_overflow=0)
    reading = create_engine(url, pool_size=NUM_READERS, max_overflow=0)
    for engine, begin, only in ((writing, "BEGIN IMMEDIATE", "OFF"), (reading, "BEGIN", "ON")):
        _prepare_sqlite(engine, begin, only)
    return Database(str(path), writing, reading, 0.0, address, lock)


def _prepare_sqlite(engine: Engine, begin: str, query_only: str) -> None:
    """Transactions begin where SQLAlchemy says so: Python's sqlite3 would begin them at the first
    INSERT, after the SAVEPOINTs (see "Transactions" in SQLAlchemy's page on SQLite)."""

    def connected(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        try:
            for pragma in (
                "busy_timeout=5000",
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
                f"query_only={query_only}",
            ):
                connection.execute(f"PRAGMA {pragma}").close()
        except sqlite3.Error:
            connection.close()
            raise

    def began(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", began)


def _postgresql(address_of_database: str, address: str | None) -> Database:
    try:
        url = make_url(address_of_database)
    except ArgumentError:
        url = None
    if url is None or url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise StoreError(
            "the store's URL is not one of PostgreSQL; write postgresql://user:password@host/name, "
            "or nothing for SQLite in the data folder"
        )
    from server.store.postgresql import connect  # it brings psycopg, which SQLite does not need

    where = url.set(drivername="postgresql").render_as_string(hide_password=True)
    url = url.set(drivername="postgresql+psycopg")
    arguments: dict[str, Any] = {
        name: value for name, value in _POSTGRESQL_ARGUMENTS.items() if name not in url.query
    }
    writing = create_engine(url, pool_size=1, max_overflow=0, connect_args=arguments)
    reading = create_engine(
        url,
        pool_size=NUM_READERS,
        max_overflow=0,
        pool_pre_ping=True,
        isolation_level="REPEATABLE READ",  # the statements of one read see the same
        connect_args=arguments,
    )
    for engine in (writing, reading):
        event.listen(engine, "do_connect", connect)
    return Database(where, writing, reading, 10.0, address, None)


def _check(connection: Connection, where: str) -> None:
    if connection.dialect.name == "postgresql":
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":
            raise StoreError(
                f"the database {where} has the encoding {encoding}, and UTF8 is needed; make one "
                "with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )
        connection.rollback()


def _migrate(connection: Connection, where: str) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "server.store:migrations")
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    with connection.begin():
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in {
            script.revision for script in scripts.walk_revisions()
        }:
            raise StoreError(
                f"the store {where} has the schema {found}, which this version of Headwater does "
                "not know: a newer one wrote it; use that one, or choose another store"
            )
        if found != scripts.get_current_head():
            alembic.command.upgrade(config, "head")

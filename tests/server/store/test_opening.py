"""Opening: old schemas are brought up to date, and what cannot be used is refused in one line."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from server.store.database import open_database
from server.store.errors import StoreError
from server.store.schema import metadata
from server.store.store import Store
from tests.server.store.conftest import Place
from tests.server.store.make_fixture import FOLDER, check
from tests.server.store.making import a_session
from tests.server.store.postgresql import Cluster


def revisions() -> list[str]:
    config = Config()
    config.set_main_option("script_location", "server.store:migrations")
    config.set_main_option("path_separator", "os")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]


def execute(place: Place, statements: str) -> None:
    """Runs the statements on the database under a store, past the store."""
    if place.url is not None:
        with psycopg.connect(place.url) as server:
            server.execute(statements.encode())
        return
    place.folder.mkdir(exist_ok=True)
    file = sqlite3.connect(place.folder / "headwater.db")
    file.executescript(statements)
    file.close()


class TestMigrations:
    @pytest.mark.parametrize("revision", revisions())
    def test_from_each_schema(self, place: Place, revision: str) -> None:
        kind = "sqlite" if place.url is None else "postgresql"
        execute(place, (FOLDER / f"{revision}.{kind}.sql").read_text())
        store = place.open()
        try:
            asyncio.run(check(store))
        finally:
            store.close()

    def test_they_make_the_tables_of_the_schema(self, place: Place) -> None:
        database, connection = open_database(place.url, place.folder, None)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        connection.close()
        database.close()

    def test_a_newer_schema(self, place: Place) -> None:
        place.open().close()
        execute(place, "UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(StoreError, match="has the schema 9999, which this version") as refused:
            place.open()
        assert "a newer one wrote it; use that one" in str(refused.value)
        execute(place, f"UPDATE alembic_version SET version_num = '{revisions()[0]}'")
        place.open().close()  # the lock was given back

    def test_one_that_fails_changes_nothing(self, place: Place) -> None:
        execute(place, "CREATE TABLE idempotency (other TEXT)")
        with pytest.raises(StoreError, match="idempotency"):
            place.open()
        execute(place, "DROP TABLE idempotency")
        place.open().close()


class TestFolders:
    def test_settings_that_make_it_durable(self, tmp_path: Path) -> None:
        database, connection = open_database(None, tmp_path, None)
        with database.reading.connect() as reading:
            for each in (connection, reading):
                found = {
                    name: each.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("journal_mode", "synchronous", "foreign_keys", "query_only")
                }
                only = int(each is reading)
                assert found == {
                    "journal_mode": "wal",
                    "synchronous": 2,
                    "foreign_keys": 1,
                    "query_only": only,
                }
        connection.close()
        database.close()

    def test_a_folder_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match=r"the data folder .*Not a directory.*HEADWATER_DATA"):
            Store.open(None, tmp_path / "file" / "data")

    def test_a_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "headwater.db").mkdir()
        with pytest.raises(StoreError, match=r"headwater.db: Is a directory; choose another"):
            Store.open(None, tmp_path)

    @pytest.mark.parametrize(
        "content", [b"no database " * 1000, b"SQLite format 3\0" + b"x" * 4080]
    )
    def test_a_file_that_is_no_database(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "headwater.db").write_bytes(content)
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r"headwater.db cannot be used: file is not a data"
            ):
                Store.open(None, tmp_path)
        assert (tmp_path / "headwater.db").read_bytes() == content


class TestServers:
    @pytest.mark.parametrize(
        "url", ["mysql://h/d", "sqlite:///x", "nonsense", "postgresql+asyncpg://h/d"]
    )
    def test_a_url_of_something_else(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(StoreError, match="write postgresql://user:password@host/name"):
            Store.open(url, tmp_path)

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="check its URL") as refused:
            Store.open(f"postgresql://ann:sesame@/d?host={tmp_path}", tmp_path)
        said = str(refused.value)
        assert "sesame" not in said and "postgresql://ann:***@/d" in said and "\n" not in said

    @pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
    def test_each_way_to_write_its_url(self, cluster: Cluster, tmp_path: Path, scheme: str) -> None:
        url = cluster.make_database().replace("postgresql", scheme, 1)
        store = Store.open(url, tmp_path)
        asyncio.run(store.create_session(a_session("s")))
        store.close()
        assert list(tmp_path.iterdir()) == []

    def test_an_encoding_that_cannot_hold_all_text(self, cluster: Cluster, tmp_path: Path) -> None:
        url = cluster.make_database("ENCODING 'LATIN1' TEMPLATE template0")
        with pytest.raises(StoreError, match="has the encoding LATIN1, and UTF8 is needed"):
            Store.open(url, tmp_path)

    def test_a_role_that_may_not(self, cluster: Cluster, tmp_path: Path) -> None:
        url = cluster.make_database()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE ROLE guest LOGIN")
        with pytest.raises(StoreError, match="permission denied"):
            Store.open(url.replace("headwater@", "guest@"), tmp_path)

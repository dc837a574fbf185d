"""A store on SQLite and on PostgreSQL: what `store` and `place` are given to runs on both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.store.store import Store
from tests.server.store.postgresql import Cluster, find_programs, running


@dataclass
class Place:
    """Where a store is: what `Store.open` takes."""

    url: str | None
    folder: Path

    def open(self, address: str | None = None) -> Store:
        return Store.open(self.url, self.folder, address)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here: install the package postgresql")
    with running(programs) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return Place(None, tmp_path / "data")
    return Place(request.getfixturevalue("cluster").make_database(), tmp_path / "data")


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    store = place.open()
    yield store
    store.close()

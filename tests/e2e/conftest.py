"""One server for all tests here that leave it as it was, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.session_client import connected
from tests.fixtures.server import Server, serving


@pytest.fixture(scope="session")
def server(wide_model: Path) -> Iterator[Server]:
    with serving(str(wide_model), "--max-num-seqs", "64", "--kv-memory", "64MiB") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with connected(server) as client:
        yield client

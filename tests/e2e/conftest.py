"""One server for all tests here that leave it as it was, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.session_client import connected
from tests.fixtures.server import Server, serving
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("long-tiny")
    make_tiny("llama", folder, max_position_embeddings=4096)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Server]:
    with serving(str(model), "--max-num-seqs", "64", "--kv-memory", "64MiB") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with connected(server) as client:
        yield client

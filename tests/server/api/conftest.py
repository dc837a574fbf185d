"""A server with room for tools: their definitions are long in the tiny vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.server import Server, serving
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with a context of 4096 tokens."""
    folder = tmp_path_factory.mktemp("wide-llama")
    make_tiny("llama", folder, max_position_embeddings=4096)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def wide_server(wide_model: Path) -> Iterator[Server]:
    """A server with that model."""
    with serving(str(wide_model)) as server:
        yield server

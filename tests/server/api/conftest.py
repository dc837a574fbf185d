"""A server with room for tools: their definitions are long in the tiny vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.server import Server, serving


@pytest.fixture(scope="session")
def wide_server(wide_model: Path) -> Iterator[Server]:
    """A server with that model."""
    with serving(str(wide_model)) as server:
        yield server

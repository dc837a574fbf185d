"""Model output is text of nobody's."""

from __future__ import annotations

import pytest

from tests.fixtures.server import Server
from tests.web.conftest import Browse

pytestmark = pytest.mark.e2e


def test_nothing_that_a_model_says_runs_or_is_loaded(browse: Browse, tiny_server: Server) -> None:
    assert browse("xss", tiny_server)["payloads"] >= 100

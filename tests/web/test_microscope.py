"""The microscope, the cache view and the KV comparison of the page."""

from __future__ import annotations

import pytest

from tests.fixtures.server import Server
from tests.web.conftest import Browse

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(240)
def test_the_glass_box_shows_what_the_server_says(browse: Browse, default_server: Server) -> None:
    browse("microscope", default_server, seconds=230)

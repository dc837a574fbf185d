"""The page where keys are set."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.owners import key_line, make_key
from tests.fixtures.server import serving
from tests.web.conftest import Browse

pytestmark = pytest.mark.e2e


def test_one_signs_in_by_key_and_out_again(
    browse: Browse, tiny_model: Path, tmp_path: Path
) -> None:
    key = make_key()
    path = tmp_path / "keys"
    path.write_text(key_line("alice", key))
    path.chmod(0o600)
    with serving(str(tiny_model), "--api-keys-file", str(path)) as server:
        browse("sign-in", server, HEADWATER_API_KEY=key)
        assert key not in server.log

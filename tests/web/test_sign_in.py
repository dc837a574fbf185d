"""The page where keys are set."""

from __future__ import annotations

import os
import subprocess
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
        # What the server prints to begin with works as it stands.
        assert server.process.stdout is not None
        printed = iter(server.process.stdout.readline, b"")
        curl = next(line for line in printed if b"curl -N" in line) + next(printed)
        env = {**os.environ, "HEADWATER_API_KEY": key}
        told = subprocess.run(["bash", "-c", curl], env=env, capture_output=True, check=True)
        assert told.stdout.endswith(b"data: [DONE]\n\n"), told.stdout
        browse("sign-in", server, HEADWATER_API_KEY=key)
        assert key not in server.log

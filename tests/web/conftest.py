"""The page in a real browser, against real servers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.page import BUILT
from tests.fixtures.server import Server

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "clients" / "web"
Browse = Callable[..., Any]


def missing() -> str | None:
    """What is not there for the scripts to run, and what to do about it."""
    if not (BUILT / "index.html").is_file():
        return "the page is not built; `make page` does it"
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not there; `make page` fetches it"
    if chromium() is None:
        return "no Chromium; `apt-get install chromium`, or set HEADWATER_CHROMIUM"
    return None


def chromium() -> str | None:
    names = (os.environ.get("HEADWATER_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browse() -> Browse:
    """Runs `clients/web/e2e/<script>.mjs` against a server; returns what it reports. The other
    arguments are variables of its environment. Set HEADWATER_SHOTS to a folder for pictures."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)

    def run(script: str, server: Server, *, seconds: float = 110, **environment: str) -> Any:
        done = subprocess.run(
            [str(WEB / "with-node"), "node", f"e2e/{script}.mjs"],
            cwd=WEB,
            env={
                **os.environ,
                "no_proxy": "*",
                "HEADWATER_CHROMIUM": chromium() or "",
                "HEADWATER_URL": server.url,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run

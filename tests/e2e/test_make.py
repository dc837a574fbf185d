"""The two commands of the README, and what CI runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*args: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_what_people_need() -> None:
    lines = make("help").splitlines()
    assert make().splitlines() == lines
    for target in ("run", "test", "check"):
        assert [line for line in lines if line.split()[:2] == ["make", target]], target


def test_run_becomes_the_server() -> None:
    """Nothing stays between a person's Ctrl+C and the server."""
    plan = make("-n", "run", "PORT=8123", "HOST=::1", "MODEL=some/model").splitlines()
    assert plan[-1] == "exec .venv/bin/headwater serve some/model --host ::1 --port 8123"


@pytest.mark.parametrize(("broken", "calls"), [("", "check test"), ("check", "check")])
def test_ci_runs_the_same_commands(tmp_path: Path, broken: str, calls: str) -> None:
    """With a `make` that only notes its targets, since the real one runs this very test."""
    noted = tmp_path / "calls"
    stand_in = tmp_path / "make"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n[ "$1" != "{broken}" ]\n')
    stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=env)
    assert noted.read_text().split() == calls.split()
    assert (result.returncode == 0) == (broken == "")

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


def test_the_page_is_built_only_when_its_sources_are_newer(tmp_path: Path) -> None:
    """In a copy, with a stand-in for Node that notes what it is asked to run and builds nothing."""
    noted = tmp_path / "calls"
    web = tmp_path / "clients" / "web"
    for folder in (web / "src" / "ui", web / "public", tmp_path / ".venv"):
        folder.mkdir(parents=True)
    for name in ("index.html", "package.json", "package-lock.json", "vite.config.ts"):
        (web / name).touch()
    page, removed = tmp_path / "server/pages/web/index.html", web / "src" / "ui" / "old.tsx"
    removed.touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    stand_in = web / "with-node"
    stand_in.write_text(
        f'#!/bin/sh\necho "$2" >> {noted}\n'
        f"mkdir -p node_modules {page.parent}\ntouch node_modules/.package-lock.json {page}\n"
    )
    stand_in.chmod(0o755)
    for file in tmp_path.rglob("*"):
        os.utime(file, (1000, 1000))
    stamp = tmp_path / ".venv" / "run.stamp"
    stamp.touch()

    def asked() -> list[str]:
        noted.write_text("")
        done = subprocess.run(
            ["make", "--old-file=.venv/run.stamp", "page"],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return noted.read_text().split()

    def renew(path: Path) -> None:
        later = page.stat().st_mtime + 10
        os.utime(path, (later, later))

    assert asked() == ["ci", "run"]
    assert asked() == []
    renew(web / "src" / "ui" / "old.tsx")
    assert asked() == ["run"]
    os.utime(page)
    removed.unlink()
    renew(removed.parent)
    assert asked() == ["run"]
    os.utime(page)
    renew(web / "package-lock.json")
    assert asked() == ["ci", "run"]


@pytest.mark.parametrize(
    ("version", "installs"),
    [("20.19.0", 0), ("22.12.0", 0), ("24.0.0", 0), ("18.20.0", 1), ("20.18.9", 1), (None, 1)],
)
def test_node_is_the_systems_where_it_is_new_enough(
    tmp_path: Path, version: str | None, installs: int
) -> None:
    """With stand-ins for Python, which notes what it installs, and for both Nodes: the system's is
    asked about itself by a script, which a real one runs where there is one."""
    web, system = tmp_path / "clients" / "web", tmp_path / "system"
    wheel, noted = tmp_path / "wheel", tmp_path / "installed"
    for folder in (web, system, wheel / "bin", tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "clients/web/with-node", web)

    def program(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    program(
        tmp_path / ".venv/bin/python",
        f'if [ "$1" = -m ]; then echo "$@" >> {noted}; elif [ -e {noted} ]; then echo {wheel}; fi',
    )
    program(wheel / "bin/node", 'echo "of the wheel: $@"')
    if version is not None:
        real = shutil.which("node")
        if real is None:
            pytest.skip("needs Node to stand in for others")
        told = f"Object.defineProperty(process.versions, 'node', {{value: '{version}'}});"
        program(
            system / "node",
            f'if [ "$1" = -e ]; then exec {real} -e "{told} $2"; fi; echo "of the system: $@"',
        )
        program(system / "npm", 'echo "npm of the system: $@"')
    for name in ("bash", "dirname", "env"):
        (system / name).symlink_to(str(shutil.which(name)))

    def run(*command: str) -> str:
        done = subprocess.run(
            [web / "with-node", *command],
            env={"PATH": str(system)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    if installs:
        npm = wheel / "lib/node_modules/npm/bin/npm-cli.js"
        assert run("npm", "ci", "--x y") == f"of the wheel: {npm} ci --x y"
        assert run("node", "a.mjs") == "of the wheel: a.mjs"
        (line,) = noted.read_text().splitlines()  # once
        assert "--require-hashes" in line and line.endswith("requirements/node.txt")
    else:
        assert run("npm", "ci") == "npm of the system: ci"
        assert run("node", "a.mjs") == "of the system: a.mjs"
        assert not noted.exists()


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

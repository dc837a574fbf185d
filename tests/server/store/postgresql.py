"""A real PostgreSQL for the tests: a cluster of its own, on a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg


def find_programs() -> Path | None:
    """The folder of initdb and pg_ctl: by PATH (where its link leads), else Debian's newest."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "pg_ctl").exists()), None)


def _unprivileged() -> str | None:
    """PostgreSQL refuses to run as root: the name of somebody else."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


class Cluster:
    """A PostgreSQL cluster in `folder`; anybody who reaches its socket may do anything."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._user = _unprivileged()
        self._num_databases = 0
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "-U", "headwater", "-A", "trust", "-E", "UTF8", "--locale=C")
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "start", "-w", "-l", str(self._folder / "log"), "-o", options)

    def stop(self) -> None:
        """As in a crash: nobody is waited for, and nothing is written first."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No process of it does anything."""
        postmaster = psutil.Process(
            int((self._folder / "data/postmaster.pid").read_text().split()[0])
        )
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in reversed(processes):
                process.resume()

    def url(self, database: str) -> str:
        return f"postgresql://headwater@/{database}?host={self._folder}"

    def make_database(self, options: str = "") -> str:
        """The URL of a new, empty database."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} {options}".encode())
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        # pg_ctl's server would keep a pipe open
        with open(self._folder.parent / f"{self._folder.name}.out", "a+") as output:
            done = subprocess.run(
                [self._programs / program, "-D", self._folder / "data", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=self._user,
                group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
                cwd="/",
                check=False,
            )
            output.seek(0)
            assert done.returncode == 0, output.read()


@contextmanager
def running(programs: Path) -> Iterator[Cluster]:
    # pytest's folders may be entered by their owner only, and a socket's path is short
    parent = Path(tempfile.mkdtemp(prefix="hw-pg-"))
    try:
        parent.chmod(0o755)
        folder = parent / "pg"
        folder.mkdir()
        cluster = Cluster(programs, folder)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(parent)

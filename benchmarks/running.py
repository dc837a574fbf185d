"""A server process: started, waited for until it answers, watched, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.peers import Peer, Work

START_SECONDS = 240.0
_STOP_SECONDS = 15.0


class Absent(Exception):
    """The server cannot be measured; the message says why."""


@dataclass(frozen=True)
class Server:
    """A peer that answers at `url`; `process` is the root of its processes."""

    peer: Peer
    command: list[str]
    url: str
    model: str
    process: psutil.Process

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """What all its living processes have computed so far."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_mib(self) -> float:
        """Resident memory of all its processes; what they share is counted in each."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def wait_idle(self, seconds: float = 20.0) -> bool:
        """Waits until it computes nothing, a tenth of a second long. False: it never stops."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(0.1)
            if self.cpu_seconds() - before < 0.02:
                return True
        return False


@contextlib.contextmanager
def started(peer: Peer, program: str, work: Work) -> Iterator[Server]:
    """Raises Absent when it does not come up."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        command = peer.command(work, program, port)
    except (OSError, ValueError, ImportError) as error:
        raise Absent(f"its model could not be made: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(work.threads, folder),
                    cwd=Path(__file__).parents[1],
                    start_new_session=True,
                )
            except OSError as error:
                raise Absent(f"{program} cannot be run: {error}") from None
        try:
            _wait_ready(process, url + peer.ready, log)
            model = peer.model(work) if peer.model is not None else _listed_model(url)
            yield Server(peer, command, url, model, psutil.Process(process.pid))
        finally:
            _stop(process)


def _environment(threads: int, data: str) -> dict[str, str]:
    return {
        **os.environ,
        "HEADWATER_DATA": data,  # nothing is found that an earlier run has kept
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    """Until `ready` is answered with 200."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Absent(f"it ended with code {process.returncode}: {_last_line(log)}")
            with contextlib.suppress(httpx.TransportError):
                if client.get(ready).status_code == 200:
                    return
            time.sleep(0.1)
    raise Absent(f"it did not answer within {START_SECONDS:.0f} s: {_last_line(log)}")


def _listed_model(url: str) -> str:
    """The id of the first model that it lists."""
    try:
        answer = httpx.get(f"{url}/v1/models", timeout=5.0, trust_env=False)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise Absent("it lists no model at /v1/models") from None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return said[-1][:300] if said else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group, which is the server's own."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived its parent

"""Readers that take little, beside others: nobody waits for them, and nothing is lost to them."""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import Show
from tests.e2e.streams import stream_events
from tests.fixtures.server import Server, serving, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.slow]

NUM_READERS = 16
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me of rivers."}],
    "stream": True,
    "resumable": True,
    "max_tokens": 3000,
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 20,
}


class FastReader(threading.Thread):
    """Reads as fast as it can, and keeps when each chunk came."""

    def __init__(self, server: Server, seed: int, max_tokens: int = 400) -> None:
        super().__init__()
        self._url = server.url
        self._body = BODY | {"seed": seed, "max_tokens": max_tokens}
        self.times: list[float] = []

    def run(self) -> None:
        url = f"{self._url}/v1/chat/completions"
        with httpx.stream("POST", url, json=self._body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.times.append(time.monotonic())


class SlowReader(threading.Thread):
    """Takes 100 bytes a second until the server gives it up."""

    def __init__(self, server: Server, seed: int) -> None:
        super().__init__(daemon=True)
        self._url, self._seed = server.url, seed
        self.generation = ""
        self.over = threading.Event()

    def run(self) -> None:
        host, port = self._url.removeprefix("http://").split(":")
        body = json.dumps(BODY | {"seed": self._seed}).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: "
                + str(len(body)).encode()
                + b"\r\n\r\n"
                + body
            )
            head = b""
            while b"x-headwater-generation: " not in head or b"\r\n\r\n" not in head:
                head += sock.recv(100)
            self.generation = head.split(b"x-headwater-generation: ")[1].split(b"\r\n")[0].decode()
            while not self.over.wait(1.0):
                sock.recv(100)


def p99_between_chunks(server: Server, count: int = 8, max_tokens: int = 400) -> float:
    """Of so many fast readers, in seconds."""
    readers = [FastReader(server, seed, max_tokens) for seed in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    gaps = [
        b - a for reader in readers for a, b in zip(reader.times, reader.times[1:], strict=False)
    ]
    return statistics.quantiles(gaps, n=100)[98]


@pytest.mark.timeout(300)
def test_nobody_waits_for_them(wide_model: Path, show: Show) -> None:
    env = {"HEADWATER_SEND_TIMEOUT": "5"}
    with serving(str(wide_model), env=env) as server:
        # The logs themselves take their room, whoever reads them.
        p99_between_chunks(server, NUM_READERS, BODY["max_tokens"])
        alone = min(p99_between_chunks(server) for _ in range(2))
        process = psutil.Process(server.process.pid)
        memory = process.memory_info().rss
        slow = [SlowReader(server, seed) for seed in range(NUM_READERS)]
        for reader in slow:
            reader.start()
        wait_until(lambda: all(reader.generation for reader in slow), 30, "they do not begin")
        # Their answers are made as fast as anybody's; then only what is read of them is left.
        wait_until(lambda: server.metric("headwater_requests_running") == 0, 120, "they hold it up")
        beside = min(p99_between_chunks(server) for _ in range(2))
        grown = process.memory_info().rss - memory
        wait_until(lambda: not connected(process), 60, "they are not given up")
        assert server.log.count("slow_reader_dropped") == NUM_READERS
        for reader in slow:
            reader.over.set()
        whole = [
            list(stream_events(httpx.get(f"{server.url}/v1/streams/{r.generation}", timeout=60)))
            for r in slow[:4]
        ]
        assert all(events[-1].event == "done" for events in whole)
        show(
            f"between chunks, p99: {1000 * alone:.1f} ms alone, {1000 * beside:.1f} ms beside "
            f"{NUM_READERS} slow readers; the server's memory grew by {grown / 2**20:.0f} MiB"
        )
        assert beside <= 1.2 * alone + 0.005
        assert grown <= 64 * 2**20


def connected(process: psutil.Process) -> list[object]:
    """The connections of clients."""
    return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]

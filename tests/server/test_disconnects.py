"""Clients that leave: their blocks come back, and nothing of them stays."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.alone

CONCURRENCY = 32


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def send(sock: socket.socket, **fields: object) -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Tell me of rivers. " * 8}],
            "ignore_eos": True,
            **fields,
        }
    ).encode()
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )


def reset(sock: socket.socket) -> None:
    """Close with RST: no goodbye."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path):  # type: ignore[no-untyped-def]
    with serving(str(tiny_model)) as server:
        yield server


@pytest.mark.parametrize("num_aborts", [160, pytest.param(500, marks=pytest.mark.slow)])
def test_random_aborts_leave_nothing_behind(server: Server, num_aborts: int) -> None:
    # One round warms up what grows once: thread pools, connection tables.
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda i: abort_somewhere(server, i), range(CONCURRENCY)))
    server.wait_idle()
    process = psutil.Process(server.process.pid)
    wait_until(lambda: len(process.net_connections("tcp")) == 1, 10, "connections are left")
    fds, threads = process.num_fds(), process.num_threads()
    blocks = server.metric("headwater_blocks", state="referenced", tier="device")
    tasks = server.metric("headwater_asyncio_tasks")
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda i: abort_somewhere(server, 1000 + i), range(num_aborts)))
    server.wait_idle(2.0)
    assert server.metric("headwater_blocks", state="referenced", tier="device") == blocks == 0
    wait_until(lambda: process.num_fds() <= fds, 2.0, f"more than {fds} descriptors")
    assert process.num_threads() <= threads
    wait_until(
        lambda: server.metric("headwater_asyncio_tasks") <= tasks, 2.0, f"more than {tasks} tasks"
    )
    assert server.metric("headwater_engine_restarts_total") == 0
    said = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "still there?"}], "max_tokens": 3},
    )
    assert said.status_code == 200


def abort_somewhere(server: Server, seed: int) -> None:
    """Leave while queued, in the prefill, at a random token, or in the last step."""
    chooser = random.Random(seed)
    with connect(server) as sock:
        send(
            sock,
            stream=chooser.random() < 0.5,
            n=chooser.choice([1, 1, 2]),
            max_tokens=chooser.choice([1, 5, 40, 200]),
            seed=seed,
        )
        for _ in range(chooser.choice([0, 0, 1, 3, 10])):
            if not sock.recv(4096):
                break
        if chooser.random() < 0.5:
            reset(sock)
        else:
            sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("stream", [True, False])
def test_blocks_are_back_within_250_ms(server: Server, stream: bool) -> None:
    server.wait_idle()
    delays = []
    for seed in range(30):
        before = server.metric("headwater_engine_aborts_total")
        with connect(server) as sock:
            send(sock, stream=stream, max_tokens=400, seed=seed)
            if stream:
                sock.recv(4096)
            wait_until(lambda: server.blocks_referenced() > 0, 10, "it never ran")
            left = time.monotonic()
            reset(sock)
        wait_until(lambda: server.blocks_referenced() == 0, 5, "blocks are not back")
        delays.append(time.monotonic() - left)
        assert server.metric("headwater_engine_aborts_total") == before + 1
    assert sorted(delays)[-1] < 0.25, delays


def test_one_of_many_leaves_and_the_others_do_not_notice(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    body = {
        "messages": [{"role": "user", "content": "Count the rivers."}],
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
    }
    expected = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]["content"]
    barrier = threading.Barrier(9)
    texts: list[str] = []

    def stay() -> None:
        barrier.wait()
        answer = httpx.post(url, json=body, timeout=60).json()
        texts.append(answer["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=stay) for _ in range(8)]
    for thread in threads:
        thread.start()
    with connect(server) as sock:
        barrier.wait()
        send(sock, stream=True, max_tokens=400)
        sock.recv(4096)
        reset(sock)
    for thread in threads:
        thread.join()
    assert texts == [expected] * 8
    server.wait_idle()

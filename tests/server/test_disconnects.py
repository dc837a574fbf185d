"""Clients that leave: their blocks come back, and nothing of them stays."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from server.store.database import NUM_READERS
from tests.fixtures.server import Server, serving, wait_until

pytestmark = pytest.mark.alone

CONCURRENCY = 32
# The threads of pools come with the first need: the store's, the event loop's, the tokenizer's.
POOLED_THREADS = NUM_READERS + min(32, (os.cpu_count() or 1) + 4) + 3
MESSAGE = {"role": "user", "content": "Tell me of rivers. " * 8}


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def send(sock: socket.socket, **fields: object) -> None:
    body = json.dumps(
        {
            "messages": [MESSAGE],
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
    nothing_is_left_behind(server, num_aborts, abort_somewhere, psutil.Process.num_fds, 0)


@pytest.mark.parametrize("num_aborts", [64, pytest.param(500, marks=pytest.mark.slow)])
def test_answers_that_are_told_to_end_leave_nothing_behind(server: Server, num_aborts: int) -> None:
    nothing_is_left_behind(server, num_aborts, end_by_a_word, descriptors, POOLED_THREADS)


def nothing_is_left_behind(
    server: Server,
    num_aborts: int,
    abort: Callable[[Server, int], None],
    count_fds: Callable[[psutil.Process], int],
    num_threads_more: int,
) -> None:
    # One round warms up what grows once: thread pools, connection tables.
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda i: abort(server, i), range(CONCURRENCY)))
    server.wait_idle()
    process, engine = psutil.Process(server.process.pid), server.engine
    wait_until(lambda: len(process.net_connections("tcp")) == 1, 10, "connections are left")
    fds, threads = count_fds(process), process.num_threads()
    of_engine = engine.num_fds(), engine.num_threads()
    blocks = server.metric("headwater_blocks", state="referenced", tier="device")
    tasks = server.metric("headwater_asyncio_tasks")
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda i: abort(server, 1000 + i), range(num_aborts)))
    server.wait_idle(2.0)
    assert server.metric("headwater_blocks", state="referenced", tier="device") == blocks == 0
    wait_until(lambda: count_fds(process) <= fds, 2.0, f"more than {fds} descriptors")
    assert process.num_threads() <= threads + num_threads_more
    assert (engine.num_fds(), engine.num_threads()) == of_engine
    wait_until(
        lambda: server.metric("headwater_asyncio_tasks") <= tasks, 2.0, f"more than {tasks} tasks"
    )
    assert server.metric("headwater_engine_restarts_total") == 0
    said = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "still there?"}], "max_tokens": 3},
    )
    assert said.status_code == 200


def descriptors(process: psutil.Process) -> int:
    """Those that are open, without the store's, whose readers come with the first need."""
    count = 0
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += "headwater.db" not in str(link.readlink())
    return count


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


def end_by_a_word(server: Server, seed: int) -> None:
    """Have a durable stream end, which whoever leaves does not: a chat's, or a session's."""
    chooser = random.Random(seed)
    in_session = chooser.random() < 0.5
    with httpx.Client(base_url=server.url, timeout=30) as http:
        if in_session:
            session = http.post("/v1/sessions", json={}).json()["id"]
            path, body = f"/v1/sessions/{session}/turns", {"input": "Tell me of rivers."}
        else:
            path, body = "/v1/chat/completions", {"messages": [MESSAGE], "resumable": True}
        fields = {"max_tokens": chooser.choice([1, 5, 40, 200]), "seed": seed, "ignore_eos": True}
        with http.stream("POST", path, json=body | fields | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            num_reads = chooser.choice([0, 0, 1, 3, 10])
            for _ in zip(range(num_reads), answer.iter_raw(), strict=False):
                pass
        if in_session:
            said = http.post(f"/v1/sessions/{session}/cancel")
            assert said.status_code in (200, 409), said.text  # 409: it had ended
        else:
            generation = answer.headers["x-headwater-generation"]
            assert http.delete(f"/v1/streams/{generation}").status_code == 200


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
            reset(sock) if seed % 2 else sock.close()
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

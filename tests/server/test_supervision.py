"""Processes that die: the engine, the server, both; and ends that are asked for."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fixtures.server import Server, serving, wait_until

BODY = {
    "messages": [{"role": "user", "content": "Tell me of rivers."}],
    "max_tokens": 450,
    "ignore_eos": True,
}


@pytest.fixture
def server(tiny_model: Path):  # type: ignore[no-untyped-def]
    with serving(str(tiny_model)) as server:
        yield server


def wait_running(server: Server, count: int) -> None:
    wait_until(lambda: server.metric("headwater_requests_running") == count, 20, "they never ran")


class Client(threading.Thread):
    """Sends one request and keeps the end of its answer, and when it came."""

    def __init__(self, server: Server, *, stream: bool) -> None:
        super().__init__()
        self._url = f"{server.url}/v1/chat/completions"
        self._stream = stream
        self.status = 0
        self.tail = ""
        self.ended = 0.0
        self.headers = httpx.Headers()

    def run(self) -> None:
        with httpx.stream(
            "POST", self._url, json={**BODY, "stream": self._stream}, timeout=60
        ) as response:
            self.status = response.status_code
            self.headers = response.headers
            self.tail = response.read().decode()
        self.ended = time.monotonic()


def test_kill_9_of_the_engine(server: Server) -> None:
    # A pool of 32 running requests, half of them streams.
    clients = [Client(server, stream=bool(i % 2)) for i in range(8)]
    for client in clients:
        client.start()
    wait_running(server, 8)
    first = server.engine.pid
    killed = time.monotonic()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not server.ready(), 1.0, "/ready does not turn 503")
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_restarting"
    assert int(refused.headers["retry-after"]) >= 1
    for client in clients:
        client.join(5)
        assert client.ended - killed < 2.0
        if client.status == 200:
            frames = [f for f in client.tail.split("\n\n") if f]
            error = json.loads(frames[-2].removeprefix("data: "))["error"]
            assert frames[-1] == "data: [DONE]"
        else:
            assert client.status == 503
            assert client.headers["retry-after"]
            error = json.loads(client.tail)["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "engine_restarting")
    wait_until(server.ready, 30, "the engine is not back")
    assert server.engine.pid != first
    assert httpx.get(f"{server.url}/health").status_code == 200
    again = httpx.post(
        f"{server.url}/v1/chat/completions", json={**BODY, "max_tokens": 5}, timeout=30
    )
    assert again.status_code == 200
    assert server.metric("headwater_engine_restarts_total") == 1
    server.wait_idle()


def test_a_stopped_engine_is_not_ready_and_comes_back(server: Server) -> None:
    engine = server.engine
    engine.suspend()
    took = wait_until(lambda: not server.ready(), 5.0, "/ready stays 200")
    assert took > 1.0  # it takes missed heartbeats
    assert httpx.get(f"{server.url}/health").status_code == 200
    engine.resume()
    wait_until(server.ready, 2.0, "/ready stays 503")
    assert server.engine.pid == engine.pid


def test_a_hung_engine_is_killed_with_its_stacks_in_the_log(tiny_model: Path) -> None:
    with serving(str(tiny_model), env={"HEADWATER_ENGINE_TIMEOUT": "4"}) as server:
        first = server.engine
        first.suspend()
        wait_until(lambda: not first.is_running(), 10, "the hung engine lives")
        wait_until(server.ready, 30, "no new engine")
        assert server.engine.pid != first.pid
        assert "engine_hangs" in server.log
        assert "most recent call first" in server.log


@pytest.mark.parametrize("stopped", [False, True])
def test_kill_9_of_the_server_leaves_no_process(tiny_model: Path, stopped: bool) -> None:
    with serving(str(tiny_model)) as server:
        client = Client(server, stream=True)
        client.run = lambda: _ignore_loss(server)  # type: ignore[method-assign]
        client.start()
        wait_running(server, 1)
        engine = server.engine
        if stopped:
            engine.suspend()
        server.process.kill()
        wait_until(
            lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE,
            2.0,
            "the engine is an orphan",
        )
        client.join(5)


def _ignore_loss(server: Server) -> None:
    try:
        httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=20)
    except httpx.TransportError:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_with_code_0(tiny_model: Path, number: signal.Signals) -> None:
    with serving(str(tiny_model)) as server:
        engine = server.engine
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert not engine.is_running()
        assert "Traceback" not in server.log


def test_running_streams_get_their_grace_and_then_an_error(tiny_model: Path) -> None:
    with serving(str(tiny_model), env={"HEADWATER_SHUTDOWN_GRACE": "0.3"}) as server:
        clients = [Client(server, stream=True) for _ in range(4)]
        for client in clients:
            client.start()
        wait_running(server, 4)
        server.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: _code(server) in ("server_draining", "gone"), 2, "new work is not refused"
        )
        assert server.process.wait(10) == 0
        for client in clients:
            client.join(5)
            frames = [f for f in client.tail.split("\n\n") if f]
            assert frames[-1] == "data: [DONE]"
            last = json.loads(frames[-2].removeprefix("data: "))
            code = last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]
            assert code in ("server_draining", "length")


def _code(server: Server) -> str:
    try:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=5)
    except httpx.TransportError:
        return "gone"
    return str(response.json().get("error", {}).get("code"))


def test_a_full_queue_is_503_with_a_time_to_come_back(tiny_model: Path) -> None:
    with serving(str(tiny_model), "--max-num-seqs", "2", "--max-queue", "2") as server:
        clients = [Client(server, stream=False) for _ in range(4)]
        for client in clients:
            client.start()
        wait_running(server, 2)
        wait_until(lambda: server.metric("headwater_requests_waiting") == 2, 10, "they do not wait")
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for client in clients:
            client.join(60)
            assert client.status == 200

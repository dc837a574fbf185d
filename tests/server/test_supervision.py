"""Processes that die: the engine, the server, both; and ends that are asked for.

What becomes of streams then is looked at more closely in tests/e2e/test_crashes.py.
"""

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

pytestmark = pytest.mark.alone

BODY = {
    "messages": [{"role": "user", "content": "Tell me of rivers."}],
    "max_tokens": 450,
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.fixture
def server(tiny_model: Path):  # type: ignore[no-untyped-def]
    with serving(str(tiny_model)) as server:
        yield server


def wait_running(server: Server, count: int) -> None:
    wait_until(lambda: server.metric("headwater_requests_running") == count, 20, "they never ran")


class Client(threading.Thread):
    """Sends one request and keeps the end of its answer, and when it came."""

    def __init__(
        self, server: Server, *, stream: bool, max_tokens: int = 450, prompt: str | None = None
    ) -> None:
        super().__init__()
        self._body = {**BODY, "stream": stream, "max_tokens": max_tokens}
        self._url = f"{server.url}/v1/chat/completions"
        if prompt is not None:
            self._body["prompt"] = prompt
            self._url = f"{server.url}/v1/completions"
        self.status = 0
        self.tail = ""
        self.ended = 0.0
        self.headers = httpx.Headers()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
            self.status = response.status_code
            self.headers = response.headers
            self.tail = response.read().decode()
        self.ended = time.monotonic()


def test_kill_9_of_the_engine(server: Server) -> None:
    # Half of them are streams.
    clients = [Client(server, stream=bool(i % 2)) for i in range(8)]
    completions = Client(server, stream=True, prompt="Tell me")
    for client in [*clients, completions]:
        client.start()
    wait_running(server, 9)
    first = server.engine.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not server.ready(), 1.0, "/ready does not turn 503")
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_restarting"
    assert int(refused.headers["retry-after"]) >= 1
    wait_until(server.ready, 30, "the engine is not back")
    assert server.engine.pid != first
    for client in [*clients, completions]:
        client.join(30)
        assert client.status == 200
    assert completions.tail.count(": the engine is being restarted\n") == 1
    # Those who wait for the whole answer notice nothing, those who stream are told of the pause.
    again = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=30)
    text = again.json()["choices"][0]["message"]["content"]
    for client in clients[::2]:
        assert json.loads(client.tail)["choices"][0]["message"]["content"] == text
    for client in clients[1::2]:
        assert client.tail.count(": the engine is being restarted\n") == 1
        assert streamed(client.tail) == (text, "length")
        assert client.tail.endswith("data: [DONE]\n\n")
    assert server.metric("headwater_engine_restarts_total") == 1
    server.wait_idle()


def data_of(body: str) -> list[str]:
    """The data of a stream's frames, without the comments in between."""
    return [line[6:] for line in body.split("\n") if line.startswith("data: ")]


def streamed(body: str) -> tuple[str, str | None]:
    """The text of a chat's stream, and its finish reason."""
    choices = [json.loads(data)["choices"][0] for data in data_of(body)[:-1]]
    return "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]


def test_an_engine_that_keeps_dying_ends_the_server(server: Server) -> None:
    client = Client(server, stream=True)
    client.start()
    wait_running(server, 1)
    pids: set[int] = set()

    def next_engine() -> bool:
        try:
            return server.engine.pid not in pids
        except LookupError:
            return False

    for _ in range(5):  # the first one works, the others die while they load
        wait_until(next_engine, 20, "there is no new engine")
        pids.add(server.engine.pid)
        server.engine.kill()
    client.join(20)
    *_, last, done = data_of(client.tail)
    assert done == "[DONE]"
    error = json.loads(last)["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_crash")
    assert server.process.wait(20) == 1
    assert server.log.rstrip().endswith("headwater: the engine process keeps dying")


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
        wait_until(lambda: not server.ready(), 5, "/ready stays 200")
        # It is let go on to tell its stacks, and is not ready for that.
        wait_until(server.ready, 30, "no new engine")
        assert server.engine.pid != first.pid
        assert not first.is_running()
        assert "engine_hangs" in server.log
        assert "most recent call first" in server.log


def test_an_engine_that_hangs_in_a_step_is_not_ready(tiny_model: Path) -> None:
    """Its heart goes on beating. What is asked meanwhile is done by the next one."""
    fatal = 7
    with serving(str(tiny_model), env={"HEADWATER_FAULT": f"hang:{fatal}"}) as server:
        assert server.ready()
        body = {"prompt": [5, fatal], "max_tokens": 4, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            assert answer.status_code == 200
            wait_until(lambda: not server.ready(), 6.0, "/ready stays 200")
            said = httpx.get(f"{server.url}/ready").json()
            assert (said["status"], "one step" in said["reason"]) == ("unready", True)
            assert httpx.get(f"{server.url}/health").status_code == 200
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as another:
                assert another.status_code == 200


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


def test_while_it_drains_nothing_new_is_made_and_what_is_there_is_read(tiny_model: Path) -> None:
    env = {"HEADWATER_SHUTDOWN_GRACE": "60"}
    message = {"role": "user", "content": "Rivers."}
    with serving(str(tiny_model), env=env) as server, httpx.Client(base_url=server.url) as http:
        key = {"idempotency-key": "one"}
        session = http.post("/v1/sessions", json={}, headers=key).json()["id"]
        conversation = http.post("/v1/conversations", json={}).json()["id"]
        export = http.get(f"/v1/sessions/{session}/export").json()
        client = Client(server, stream=True)
        client.start()
        wait_running(server, 1)
        engine = server.engine
        engine.suspend()  # so that it drains until it is told to go on
        try:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.ready(), 2, "/ready stays 200")
            assert http.get("/ready").headers["connection"] == "close"
            for path, body in (
                ("/v1/sessions", {}),
                ("/v1/sessions/import", export),
                (f"/v1/sessions/{session}/fork", {}),
                (f"/v1/sessions/{session}/turns", {"input": "Rivers.", "answer": False}),
                (f"/v1/sessions/{session}/turns", {"input": "Rivers."}),
                ("/v1/conversations", {}),
                (f"/v1/conversations/{conversation}/items", {"items": [message]}),
                ("/v1/responses", {"input": "Rivers."}),
                ("/v1/chat/completions", {"messages": [message]}),
            ):
                refused = http.post(path, json=body)
                assert refused.status_code == 503, (path, refused.text)
                assert refused.json()["error"]["code"] == "server_draining"
                assert refused.headers["connection"] == "close"
                assert int(refused.headers["retry-after"]) >= 1
            assert http.post("/v1/sessions", json={}, headers=key).json()["id"] == session
            read = http.get(f"/v1/sessions/{session}")
            assert read.json()["turns"] == [] and "connection" not in read.headers
            assert http.delete(f"/v1/sessions/{session}").status_code == 204
        finally:
            engine.resume()
        client.join(20)
        assert client.tail.endswith("data: [DONE]\n\n")
        assert server.process.wait(10) == 0


def _code(server: Server) -> str:
    try:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=5)
    except httpx.TransportError:
        return "gone"
    return str(response.json().get("error", {}).get("code"))


def test_a_full_queue_is_503_with_a_time_to_come_back(wide_model: Path) -> None:
    with serving(str(wide_model), "--max-num-seqs", "2", "--max-queue", "2") as server:
        clients = [Client(server, stream=False, max_tokens=3800) for _ in range(4)]
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

"""Connections as they come: what never becomes a request is told so, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from server import connection
from server.connection import MAX_HEAD_BYTES, Connection
from tests.fixtures.server import Server, wait_until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = (
    b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
SIZED = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
PIECE = b"x" * 65536
STREAMED = {"prompt": "Why?", "stream": True, "ignore_eos": True, "max_tokens": 5, "seed": 1}


def connect(server: Server | Quick) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def chunked(path: bytes, body: bytes) -> bytes:
    return POST % path + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while piece := sock.recv(65536):
        found += piece
    return found


def read_to(sock: socket.socket, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        piece = sock.recv(65536)
        assert piece, found
        found += piece
    return found


def refused(answer: bytes, status: int, code: str) -> str:
    """The message of an error that ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith(f"http/1.1 {status} "), lines[0]
    assert lines.count("connection: close") == 1
    assert [line for line in lines if line.startswith("x-request-id: req_")]
    error: dict[str, Any] = json.loads(body)["error"]
    assert error["code"] == code
    return str(error["message"])


class Quick:
    """A server whose limits of time are short. Its application reads the body, says so, and ends
    its answer when it is told to `go_on`. At /deaf it reads nothing before that, and at /early
    it answers without the body."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        config = uvicorn.Config(
            self._app, interface="asgi3", http=Connection, lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=[self._serve()])
        self._ready = threading.Event()
        self.received: list[Any] = []

    async def _serve(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._server._serve(sockets=[self._sock])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/deaf":
            await self._event.wait()
        while scope["path"] != "/early":
            self.received.append(message := await receive())
            if message["type"] == "http.disconnect":
                return
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"read", "more_body": True})
        if scope["path"] != "/early":
            await self._event.wait()
        await send({"type": "http.response.body", "body": b"done"})

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    def __enter__(self) -> Quick:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self._server.should_exit = True
        self._thread.join(10)
        self._sock.close()
        assert not self._thread.is_alive()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quick]:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.4)
    with Quick() as server:
        yield server


# ---------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (HEAD + b"x-long: ", PIECE),
        (HEAD, b"x-many: 1\r\n" * 6000),
        (b"GET /", PIECE),
        (b"", b"\r\n" * 32768),
        (POST % b"/tokenize" + b"2\r\n{}\r\n0\r\nx-late: ", PIECE),
        (POST % b"/tokenize" + b"2;ext=", PIECE),
    ],
    ids=["one", "many", "the path", "none", "trailers", "an extension"],
)
def test_headers_without_an_end_are_refused(
    tiny_server: Server, beginning: bytes, piece: bytes
) -> None:
    with connect(tiny_server) as sock:
        sock.sendall(beginning)
        sent = 0
        while not select.select([sock], [], [], 0)[0]:
            assert sent < 150_000_000, "it takes all of it"
            sock.sendall(piece)
            sent += len(piece)
        assert "65536" in refused(read_all(sock), 431, "request_too_large")


@pytest.mark.parametrize(
    ("size", "status"), [(MAX_HEAD_BYTES, b"200"), (MAX_HEAD_BYTES + 99, b"431")]
)
@pytest.mark.parametrize("before", [b"", HEAD + b"\r\n"], ids=["the first", "a later one"])
def test_headers_that_just_fit(
    tiny_server: Server, size: int, status: bytes, before: bytes
) -> None:
    head = HEAD + b"Connection: close\r\nx-long: "
    with connect(tiny_server) as sock:
        sock.sendall(before + head + b"x" * (size - len(head) - 4) + b"\r\n\r\n")
        assert b"HTTP/1.1 " + status in read_all(sock)


def test_a_later_request_does_not_pay_for_an_earlier_one(tiny_server: Server) -> None:
    with connect(tiny_server) as sock:
        for _ in range(4):
            sock.sendall(HEAD + b"x-long: " + b"x" * 30_000 + b"\r\n\r\n")
            assert read_to(sock, b'{"status":"ok"}').startswith(b"HTTP/1.1 200 ")
        asked = chunked(b"/tokenize", b'{"text": "' + b"x" * 100_000 + b'"}')
        for at in range(0, len(asked), 9999):
            sock.sendall(asked[at : at + 9999])
        assert sock.recv(12) == b"HTTP/1.1 200"


def test_what_is_not_http_is_told_so(tiny_server: Server) -> None:
    with connect(tiny_server) as sock:
        sock.sendall(b"Hello?\r\n\r\n")
        assert "HTTP" in refused(read_all(sock), 400, "invalid_value")


def test_a_fault_waits_for_the_answer_before_it(tiny_server: Server) -> None:
    body = json.dumps({**STREAMED, "max_tokens": 400}).encode()
    with connect(tiny_server) as sock:
        sock.sendall(chunked(b"/v1/completions", body))
        found = sock.recv(65536)
        sock.sendall(b"Hello?\r\n\r\n")
        stream, _, answer = (found + read_all(sock)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert stream.startswith(b"HTTP/1.1 200 ") and stream.count(b"HTTP/1.1 ") == 1
        refused(answer, 400, "invalid_value")


# --------------------------------------------------------------------------------- HTTP/1.0


def ask(server: Server, version: bytes, body: dict[str, Any]) -> tuple[list[bytes], bytes]:
    """The lines of the head, in lower case, and all that follows until the server closes."""
    content = json.dumps(body).encode()
    with connect(server) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/%b\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (version, len(content), content)
        )
        head, _, rest = read_all(sock).partition(b"\r\n\r\n")
    return head.lower().split(b"\r\n"), rest


def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_the_connection(
    tiny_server: Server,
) -> None:
    head, rest = ask(tiny_server, b"1.0", STREAMED)
    assert b" 200 " in head[0] and b"content-type: text/event-stream; charset=utf-8" in head
    assert not [line for line in head if line.startswith(b"transfer-encoding")]
    frames = rest.split(b"\n\n")
    assert all(frame.startswith(b"data: ") for frame in frames[:-1])
    assert frames[-2:] == [b"data: [DONE]", b""]
    head, rest = ask(tiny_server, b"1.0", {**STREAMED, "stream": False})
    assert b"content-length: %d" % len(rest) in head


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_stream_says_once_whether_the_connection_goes_on(
    tiny_server: Server, version: bytes
) -> None:
    head, _ = ask(tiny_server, version, STREAMED)
    assert [line for line in head if line.startswith(b"connection")] == [b"connection: close"]


# ------------------------------------------------------------------------------ half a close


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_has_said_all_is_answered(
    quick: Quick, version: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HALF_CLOSED_SECONDS", 60)  # however busy this machine is
    with connect(quick) as sock:
        sock.sendall((SIZED % (b"/", 0)).replace(b"1.1", version))
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(12) == b"HTTP/1.1 200"
        quick.go_on()
        assert b"done" in read_all(sock)


@pytest.mark.parametrize("stream", [True, False])
def test_but_a_long_answer_takes_it_for_gone(tiny_server: Server, stream: bool) -> None:
    before = tiny_server.metric("headwater_engine_aborts_total")
    body = json.dumps({**STREAMED, "max_tokens": 480, "stream": stream}).encode()
    with connect(tiny_server) as sock:
        sock.sendall(chunked(b"/v1/completions", body))
        wait_until(lambda: tiny_server.blocks_referenced() > 0, 10, "it never ran")
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: tiny_server.blocks_referenced() == 0, 5, "it goes on")
    assert tiny_server.metric("headwater_engine_aborts_total") == before + 1


# ---------------------------------------------------------------------------------- how many


def test_one_connection_too_many_is_503(tiny_server: Server) -> None:
    pid, limit = tiny_server.process.pid, resource.RLIMIT_NOFILE
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (200, before[1]))  # 150 connections, and the server's own files
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(connect(tiny_server)).sendall(HEAD)
            with connect(tiny_server) as sock:
                answer = read_all(sock)
            assert "connections" in refused(answer, 503, "queue_full")
            assert b"\r\nretry-after: 1\r\n" in answer
            stack.close()
        wait_until(tiny_server.ready, 5, "connections that were closed still count")
    finally:
        resource.prlimit(pid, limit, before)


# ------------------------------------------------------------------------------------- time


def wait_for_the_clock(quick: Quick) -> None:
    """As long as anything may take that arrives now."""
    with connect(quick) as sock:
        sock.sendall(HEAD)
        refused(read_all(sock), 408, "invalid_value")


def drip(sock: socket.socket) -> bytes:
    """Send until the server has an answer, a little each time, and never too late for the next."""
    while not select.select([sock], [], [], 0.05)[0]:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"x")
    return read_all(sock)


@pytest.mark.parametrize("before", [b"", SIZED % (b"/", 0)], ids=["the first", "a later one"])
def test_headers_that_stop_or_drip_are_408(quick: Quick, before: bytes) -> None:
    quick.go_on()
    with connect(quick) as stopped, connect(quick) as dripping:
        for sock in (stopped, dripping):
            if before:
                sock.sendall(before)
                read_to(sock, b"0\r\n\r\n")
            sock.sendall(HEAD)
        assert "0.4 s" in refused(drip(dripping), 408, "invalid_value")
        assert "0.4 s" in refused(read_all(stopped), 408, "invalid_value")


def test_a_connection_that_says_nothing_is_closed_without_a_word(quick: Quick) -> None:
    """A browser opens some before it needs them, and would take a 408 for an answer."""
    with connect(quick) as sock:
        assert read_all(sock) == b""
    with connect(quick) as sock:
        sock.sendall(b"\r\n")
        refused(read_all(sock), 408, "invalid_value")


@pytest.mark.parametrize("some", [b"", b"x" * 9])
def test_a_body_that_stops_is_408_and_the_application_is_told(quick: Quick, some: bytes) -> None:
    with connect(quick) as sock:
        sock.sendall(SIZED % (b"/", 10) + some)
        assert "0.4 s" in refused(read_all(sock), 408, "invalid_value")
    told = {"type": "http.disconnect"}
    wait_until(lambda: quick.received[-1:] == [told], 5, "the application waits for the rest")


def test_a_body_may_come_slowly(quick: Quick) -> None:
    quick.go_on()
    sent = 0
    with connect(quick) as sock:
        sock.sendall(SIZED % (b"/", 1000))
        for _ in range(3):  # three times as long as a pause may be
            with connect(quick) as other:
                other.sendall(SIZED % (b"/", 10))
                while not select.select([other], [], [], 0.05)[0]:
                    sock.sendall(b"x")
                    sent += 1
                refused(read_all(other), 408, "invalid_value")
        sock.sendall(b"x" * (1000 - sent))
        assert read_to(sock, b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", [b"/", b"/deaf"])
def test_an_answer_takes_as_long_as_it_needs(quick: Quick, path: bytes) -> None:
    """Also where the client says something more meanwhile, or the application does not listen."""
    size = 200_000
    with connect(quick) as sock:
        sock.sendall(SIZED % (path, size) + b"x" * size + b"\r\n")
        wait_for_the_clock(quick)
        wait_for_the_clock(quick)
        quick.go_on()
        assert read_to(sock, b"done\r\n0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_the_rest_of_a_body_that_is_answered_already_has_its_time_too(quick: Quick) -> None:
    with connect(quick) as sock:
        sock.sendall(SIZED % (b"/early", 10**9))
        assert read_to(sock, b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(ConnectionResetError):
            assert drip(sock) == b""

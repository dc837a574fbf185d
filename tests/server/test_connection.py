"""Connections as they come: what never becomes a request is told so, and ends."""

from __future__ import annotations

import json
import select
import socket
from typing import Any

import pytest

from server.connection import MAX_HEAD_BYTES
from tests.fixtures.server import Server

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = (
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
PIECE = b"x" * 65536


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


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


# ---------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (HEAD + b"x-long: ", PIECE),
        (HEAD, b"x-many: 1\r\n" * 6000),
        (b"GET /", PIECE),
        (b"", b"\r\n" * 32768),
        (POST + b"2\r\n{}\r\n0\r\nx-late: ", PIECE),
        (POST + b"2;ext=", PIECE),
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
        body = b'{"text": "' + b"x" * 100_000 + b'"}'
        for at in range(
            0, len(chunks := POST + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)), 9999
        ):
            sock.sendall(chunks[at : at + 9999])
        assert sock.recv(12) == b"HTTP/1.1 200"


def test_what_is_not_http_is_told_so(tiny_server: Server) -> None:
    with connect(tiny_server) as sock:
        sock.sendall(b"Hello?\r\n\r\n")
        assert "HTTP" in refused(read_all(sock), 400, "invalid_value")


def test_a_fault_waits_for_the_answer_before_it(tiny_server: Server) -> None:
    body = json.dumps({"prompt": "Why?", "stream": True, "ignore_eos": True, "max_tokens": 400})
    asked = POST.replace(b"/tokenize", b"/v1/completions")
    with connect(tiny_server) as sock:
        sock.sendall(asked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body.encode()))
        found = sock.recv(65536)
        sock.sendall(b"Hello?\r\n\r\n")
        stream, _, answer = (found + read_all(sock)).partition(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert stream.startswith(b"HTTP/1.1 200 ") and stream.count(b"HTTP/1.1 ") == 1
        refused(answer, 400, "invalid_value")

"""A request to a server -> when its text came, and what it counted.

The client shares the machine with the server that it measures: bytes go from the socket through a
parser in C into one typed decoder, with no task, queue or timer for each piece of an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from server.bench.report import RequestTiming

_CONNECT_SECONDS = 10.0
_FRAMED = (b"content-length", b"transfer-encoding")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


async def read_stream(
    url: str, body: bytes, headers: Mapping[str, str], timing: RequestTiming, timeout: float
) -> None:
    """POST `body` to `url` on a connection of its own and note in `timing` when text comes, until
    the answer ends. Whatever fails is the timing's `error`; nothing is raised. No proxy is used.
    `timeout`: seconds without a byte."""
    reader = _Reader(timing)
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    timing.started = time.perf_counter()
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().create_connection(
                lambda: reader,
                parts.hostname or "",
                parts.port or (443 if tls else 80),
                ssl=tls or None,
            )
    except TimeoutError:
        timing.error = "connect_timeout"
    except OSError:
        timing.error = "connect_error"
    else:
        try:
            reader.send(_request(parts.netloc, parts.path, body, headers))
            await reader.ended(timeout)
        finally:
            reader.close()
    timing.ended = time.perf_counter()


def _request(host: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Streams are read raw, so they must not be compressed."""
    fields = {
        "Host": host.rpartition("@")[2],
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Reader(asyncio.Protocol):
    """The answer on one connection.

    Servers differ: no role chunk, no `[DONE]`, CRLF, comments, `event:` lines, usage in a chunk of
    its own or on each chunk. Events here hold one `data:` line, as in every such server."""

    def __init__(self, timing: RequestTiming) -> None:
        self._timing = timing
        self._parser = httptools.HttpResponseParser(self)
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._framed = False  # whether the answer says itself where it ends
        self._now = 0.0
        self._rest = b""
        self._refusal = b""

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    async def ended(self, timeout: float) -> None:
        """When the answer is over, or nothing has come for that long."""
        while not self._end.done():
            before = self._now
            await asyncio.wait([self._end], timeout=timeout)
            if not self._end.done() and self._now == before:
                self._finish("read_timeout")

    # ------------------------------------------------------------------ called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._finish("remote_protocol_error")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._finish("read_error")
        elif self._framed:
            self._finish("remote_protocol_error")
        else:
            self._finish(None)

    # ------------------------------------------------------------------ called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: ARG002
        self._framed = self._framed or name.lower() in _FRAMED

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._refusal += body
            return
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self._timing.finished = True
            elif data:
                _note(data, self._now, self._timing)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._finish(None if status == 200 else error_code(self._refusal, status))

    def _finish(self, error: str | None) -> None:
        if not self._end.done():
            self._timing.error = self._timing.error or error
            self._end.set_result(None)


def _note(data: bytes, now: float, timing: RequestTiming) -> None:
    try:
        chunk = _decode_chunk(data)
    except msgspec.DecodeError:
        timing.error = timing.error or "bad_chunk"
        return
    if chunk.error is not None:
        timing.error = timing.error or error_code(data, 200)
    if chunk.usage is not None and chunk.usage.completion_tokens is not None:
        timing.prompt_tokens = chunk.usage.prompt_tokens
        timing.completion_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        timing.cached_tokens = details.cached_tokens if details is not None else None
    for choice in chunk.choices or ():
        delta = choice.delta
        text = choice.text if delta is None else delta.content
        thought = None if delta is None else delta.reasoning_content or delta.reasoning
        if text or thought:
            timing.arrivals.append(now)
            timing.pieces.append(text or "")
        if choice.finish_reason:
            timing.finished = True


def error_code(body: bytes, status: int) -> str:
    """The code of an error body, `http_<status>` when it has none."""
    fallback = f"http_{status}" if status != 200 else "stream_error"
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return fallback
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return fallback
    code = error.get("code") or error.get("type")
    return str(code)[:64] if code else fallback

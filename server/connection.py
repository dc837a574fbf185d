"""One connection: uvicorn's, with bounds on the headers, on the time that a request takes to
arrive, and on how many connections there are.

What never becomes a request that the application could answer is answered here, in the shape of
all errors, and the connection ends. A request that is here whole may be answered as slowly as it
needs.
"""

from __future__ import annotations

import asyncio
import http
import resource
from typing import Any

import structlog
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import (
    HeadersTooLarge,
    HeadwaterError,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
)
from server.middleware import new_request_id
from server.responses import error_response
from server.sse import ABORT

log = structlog.get_logger()

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10.0  # for the headers, however steadily they drip
BODY_SECONDS = 30.0  # between two pieces of a body
HALF_CLOSED_SECONDS = 0.03  # the blocks of those who leave come back so much later
LINGER_SECONDS = 2.0


class Connection(HttpToolsProtocol):
    """Reads requests from a socket, and hands them to the application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_body = False  # the headers are there, the end of the body is not
        self._unparsed = 0  # bytes since the parser had something whole; all are kept in memory
        self._clock: asyncio.TimerHandle | None = None  # runs while a request arrives
        self._fault: HeadwaterError | None = None  # nothing is read after it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            fault = QueueFull("too many connections are open; try again in a moment")
            log.info("request_refused", status=fault.status, reason=fault.message)
            self.transport.write(_answer(fault, {"path": "", "state": {}}))
            self.transport.close()  # without a wait for what the client says: it has a descriptor
            return
        # Who says nothing at all is as one who says nothing more, who has less time.
        self.timeout_keep_alive_task = self.loop.call_later(
            HEAD_SECONDS, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES:  # also chunk extensions and trailers
            self._refuse(_headers_too_large())
        self._set_clock()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has asked and closes its half may listen (`nc -N`), or be gone, which looks
        the same. So it gets what is answered in a moment; then it has left."""
        listens = not (self._in_body or self.cycle is None or self.cycle.response_complete)
        if listens:
            self.cycle.keep_alive = False
            self.loop.call_later(HALF_CLOSED_SECONDS, self.transport.close)
        return listens

    # ------------------------------------------------------------------- what the parser calls

    def on_message_begin(self) -> None:
        self._unparsed = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse(_headers_too_large())
            raise ValueError("too large")  # so the parser stops
        self._in_body = True
        self._stop_clock()
        self.scope["state"][ABORT] = self.transport.abort
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_body = False
        self._stop_clock()
        super().on_message_complete()

    # ------------------------------------------------------------------------------- HTTP/1.0

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _unchunked(cycle, app)
        super()._start_asgi_task(cycle, app)

    # ------------------------------------------------------------------------------- the clock

    def _set_clock(self) -> None:
        """After something came. What comes of a body that is answered already gains no time."""
        answered = self.cycle is None or self.cycle.response_complete
        if self._in_body and not answered:
            self._stop_clock()
        if self._clock is None and (self._in_body or answered) and self._fault is None:
            self._start_clock()

    def _start_clock(self) -> None:
        seconds = BODY_SECONDS if self._in_body else HEAD_SECONDS
        self._clock = self.loop.call_later(seconds, self._ring)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _ring(self) -> None:
        self._clock = None
        if self.flow.read_paused:  # it is we who let it wait
            self._start_clock()
        elif self._in_body:
            self._refuse(RequestTimeout(f"nothing more of the body came for {BODY_SECONDS:g} s"))
        else:
            self._refuse(RequestTimeout(f"the headers did not end within {HEAD_SECONDS:g} s"))

    # --------------------------------------------------------------------- how it ends in a fault

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(InvalidRequest("the request is not valid HTTP"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._tell_fault()

    def _refuse(self, error: HeadwaterError) -> None:
        """End the connection with that error, after the answers to what came before."""
        if self._fault is None and not self.transport.is_closing():
            self._fault = error
            self._stop_clock()
            log.info("request_refused", status=error.status, reason=error.message)
            self._tell_fault()

    def _tell_fault(self) -> None:
        if self._fault is None or self.transport.is_closing():
            return
        scope: dict[str, Any] = {"path": "", "state": {}}
        if self._in_body and not self.pipeline and not self.cycle.response_started:
            scope = dict(self.scope)
            self.cycle.disconnected = True  # for the application, which waits for the rest
            self.cycle.message_event.set()
        elif self.cycle is not None and not self.cycle.response_complete:
            return
        elif self._in_body:  # it was answered before it was whole
            self.transport.close()
            return
        self.transport.write(_answer(self._fault, scope))
        # Closed at once, with something unread, it would be reset, and the answer lost on the way.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _unchunked(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """`app` for a client that knows no chunks: what has no length ends with the connection."""

    async def unchunked(scope: Any, receive: Any, send: Any) -> None:
        unsized = False

        async def as_it_is(message: Any) -> None:
            nonlocal unsized
            if message["type"] == "http.response.start":
                unsized = all(name.lower() != b"content-length" for name, _ in message["headers"])
                if unsized:
                    cycle.chunked_encoding = False
            elif unsized:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, as_it_is)

    return unchunked


def most_connections() -> int:
    """Three quarters of the descriptors that this process may have: without one left over, neither
    the store nor a new engine could be opened."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit * 3 // 4


def _headers_too_large() -> HeadwaterError:
    return HeadersTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes; send less")


def _answer(error: HeadwaterError, scope: dict[str, Any]) -> bytes:
    request_id = scope["state"].setdefault("request_id", new_request_id())
    response = error_response(error, scope)
    headers = [
        *response.raw_headers,
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    lines = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])

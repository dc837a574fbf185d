"""One connection: uvicorn's, with a bound on the headers.

What never becomes a request that the application could answer is answered here, in the shape of
all errors, and the connection ends.
"""

from __future__ import annotations

import http
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import HeadersTooLarge, HeadwaterError, InvalidRequest
from server.middleware import new_request_id
from server.responses import error_response

log = structlog.get_logger()

MAX_HEAD_BYTES = 64 * 1024
LINGER_SECONDS = 2.0


class Connection(HttpToolsProtocol):
    """Reads requests from a socket, and hands them to the application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_body = False  # the headers are there, the end of the body is not
        self._unparsed = 0  # bytes since the parser had something whole; all are kept in memory
        self._fault: HeadwaterError | None = None  # nothing is read after it

    def data_received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES:  # also chunk extensions and trailers
            self._refuse(_headers_too_large())

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
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_body = False
        super().on_message_complete()

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

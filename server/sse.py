"""Server-sent events: the one place that writes frames.

A stream ends in one of four ways: its events run out; the client leaves; the client reads too
slowly for `send_timeout`; the server stops (the generations then end with an error event). In every
case `on_close` is called exactly once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import structlog
from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

log = structlog.get_logger()

# Streams end by themselves when the server stops; the library would cut them at once.
AppStatus.enable_automatic_graceful_drain = False

PING_SECONDS = 10
ABORT = "abort"  # in the scope's state: drops the connection, and what is unsent
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def data_frame(document: Any) -> bytes:
    """`data: {...}` and an empty line. JSON has no raw newline, so one line is enough."""
    return b"data: " + _encoder.encode(document) + b"\n\n"


def event_frame(event: str, document: Any, id: int | None = None) -> bytes:
    """A named event with JSON data. With an `id`, it is where a reader that comes back goes on."""
    head = b"" if id is None else b"id: %d\n" % id
    return head + b"event: " + event.encode() + b"\n" + data_frame(document)


def comment_frame(text: str) -> bytes:
    """A comment. It has no empty line: with one, a client that has seen an `id:` takes it for an
    event without data."""
    return b": " + text.encode() + b"\n"


class EventStream(EventSourceResponse):
    """Frames of bytes from `frames`, comments in between, and `on_close` at the end."""

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        send_timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            frames,
            headers=headers,
            ping=PING_SECONDS,
            # The library's own comments end in an empty line; bytes it sends as they are.
            ping_message_factory=lambda: comment_frame("ping"),  # type: ignore[arg-type,return-value]
            sep="\n",
            send_timeout=send_timeout,
        )
        del self.headers["connection"]  # that is the protocol's to say, and it may say the contrary
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("slow_reader_dropped", path=scope["path"], seconds=self.send_timeout)
            # Closed in good order, the connection would wait for the reader to take what was sent.
            scope.get("state", {}).get(ABORT, lambda: None)()
        finally:
            self._on_close()

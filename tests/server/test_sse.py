"""Streams of events as an ASGI server gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server import sse
from server.sse import EventStream, event_frame


def test_comments_keep_a_silent_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no empty line: a client that has seen an id would take it for an event."""
    monkeypatch.setattr(sse, "PING_SECONDS", 0.001)
    sent: list[bytes] = []
    closed: list[bool] = []

    async def scenario() -> None:
        heard = asyncio.Event()

        async def frames() -> AsyncIterator[bytes]:
            yield event_frame("start", {}, 1)
            await heard.wait()
            yield event_frame("done", {}, 2)

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        async def send(message: Any) -> None:
            body = message.get("body", b"")
            sent.append(body)
            if body.startswith(b":"):
                heard.set()

        stream = EventStream(frames(), on_close=lambda: closed.append(True), send_timeout=5)
        await stream({"type": "http", "path": "/", "method": "GET"}, receive, send)

    asyncio.run(scenario())
    text = b"".join(sent).decode()
    assert text.startswith("id: 1\nevent: start\ndata: {}\n\n: ping\n")
    assert text.endswith(": ping\nid: 2\nevent: done\ndata: {}\n\n")
    assert ": ping\n\n" not in text
    assert closed == [True]

"""Bytes of a server's answer -> when text came, and what the server counted."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec

from server.bench.report import RequestTiming


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


async def read_stream(response: httpx.Response, timing: RequestTiming) -> None:
    """Reads events until the stream ends, or `[DONE]`, noting when text came.

    Servers differ: no role chunk, no `[DONE]`, CRLF, comments, `event:` lines, usage in a chunk of
    its own or on each chunk. Events here hold one `data:` line, as in every such server."""
    rest = b""
    async for received in response.aiter_raw():
        now = time.perf_counter()
        lines = (rest + received).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                timing.finished = True
            elif data:
                _note(data, now, timing)


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


def failure_code(error: httpx.HTTPError) -> str:
    """A transport failure as a code: ConnectError -> connect_error."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
